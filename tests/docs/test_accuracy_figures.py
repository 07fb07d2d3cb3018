"""The accuracies in the documents are those of the committed runs."""

import json
from typing import Any

from dycoke_core.tiny import FIGURES
from dycoke_core.tiny import figures as tiny_figures
from loadtest.accuracy.statistics import Estimate
from tests.docs.documents import ROOT
from tests.docs.figures import figures_without_data, percent, rounded, run, section, share, signed
from tests.docs.tables import table, words

RUN = run("accuracy/accuracy.json")
SETTINGS = RUN["settings"]
CLAIMS = {claim["text"]: Estimate(**claim["difference"]) for claim in RUN["claims"]}
FULL, DYCOKE = SETTINGS["full"], SETTINGS["dycoke (K=0.7, L=3, P=0.7)"]


def short(name: str) -> str:
    return share(SETTINGS[name]["short"]["value"])


def described(name: str) -> str:
    return share(SETTINGS[name]["describe"]["value"])


def family(name: str, which: str, digits: int = 3) -> str:
    return share(SETTINGS[name]["families"][which], digits)


def difference(claim: str) -> str:
    found = CLAIMS[claim]
    return f"{signed(found.value)} [{signed(found.low)}, {signed(found.high)}]"


def loss(claim: str) -> str:
    """The same, of what is lost."""
    found = CLAIMS[claim]
    return f"{share(-found.value)} [{share(-found.high)}, {share(-found.low)}]"


def flops(setting: dict[str, Any]) -> str:
    return f"{rounded(setting['paper_flops'] / 1e9, 1)} GFLOP"


def sees(setting: dict[str, Any]) -> str:
    return percent(setting["visual_tokens_prefill"] / setting["visual_tokens_in"])


def attends(setting: dict[str, Any]) -> str:
    return percent(setting["retained_ratio_decode_all_layers"])


def number_lost(which: str) -> str:
    return share(DYCOKE["families"][which] - FULL["families"][which], 2)


def test_the_table_of_the_readme() -> None:
    _, full, dycoke = zip(*table("README.md", "", "full tokens", "dycoke").rows, strict=True)
    for column, setting in ((full, FULL), (dycoke, DYCOKE)):
        assert column == (
            sees(setting),
            attends(setting),
            share(setting["short"]["value"]),
            share(setting["describe"]["value"]),
        )
    (number,) = set(RUN["test_set"]["questions"].values())
    text = words("README.md")
    assert f"on {number} questions per family" in text
    right = [share(setting["short"]["value"]) for setting in (DYCOKE, FULL)]
    assert f"gets {right[0]} of the short questions right instead of {right[1]} " in text


def brief_events(better: str) -> list[str]:
    """Of TTM, as against another stage I, at K = 0.7 and 0.9."""
    gains = [CLAIMS[f"TTM is above {better}, K={k}, brief events"].value for k in ("0.7", "0.9")]
    theirs = [family(f"{better} (K={k})", "brief_event", 2) for k in ("0.7", "0.9")]
    first, second = (share(gain, 2) for gain in gains)
    return [f"{first} and {second} better than", f"({theirs[0]} and {theirs[1]})"]


def test_what_the_committed_run_shows() -> None:
    text = section("docs/accuracy.md", "# What compression costs")
    _, text = text.split("What the committed run shows")
    assert abs(DYCOKE["paper_flops"] / FULL["paper_flops"] - 1 / 3) < 0.01
    assert number_lost("number") == number_lost("stationary")
    once = "Choosing anew is above choosing once, descriptions"
    highest = "Highest scores are above lowest, descriptions"
    over_random = "Highest scores are above random ones, descriptions"
    over_prumerge = "DyCoke is above PruMerge, "
    over_fastv = "DyCoke is above FastV, "
    within = "DyCoke is within .02 of full tokens, "
    few, many = "dycoke (K=0.3, L=3, P=0.7)", "dycoke (K=0.9, L=3, P=0.7)"
    ttm = "dycoke (K=0.7, L=3, P=0.7)"
    layer_one, layer_zero = "dycoke (K=0.7, L=1, P=0.7)", "dycoke (K=0.9, L=0, P=0.9)"
    whole = "full, 16 frames"
    (number,) = set(RUN["test_set"]["questions"].values())
    said = [
        f"{number} questions per family",
        "95 % intervals",
        f"sees {sees(DYCOKE)} of the visual tokens, for a third of the FLOPs",
        f"sees {attends(DYCOKE)} ({percent(DYCOKE['retained_ratio'])} in the pruned layers)",
        f"costs {loss(f'{within}short answers')} ({short(ttm)} against {short('full')})",
        "within .02 of full tokens",
        f"costs {loss(f'{within}descriptions')} ({described(ttm)} against {described('full')})",
        f"(transitions {family('full', 'transition')} to {family(ttm, 'transition')})",
        f"both {number_lost('number')}",
        f"it is {family(ttm, 'brief_event')}, with full tokens {family('full', 'brief_event')}",
        "At K = 0.7 and 0.9",
        *brief_events("random_ttm"),
        *brief_events("fewer_frames"),
        f"random tokens ({described('random_ttm (K=0.7)')})",
        f"fewer frames ({described('fewer_frames (K=0.7)')})",
        f"than TTM ({described(ttm)})",
        f"K = 0.3, which keeps {sees(SETTINGS[few])}",
        f"(stationary {family(few, 'stationary', 2)}, "
        f"with full tokens {family('full', 'stationary', 3)})",
        f"worse ({short(few)})",
        f"K = 0.9 ({short(many)}), which keeps {sees(SETTINGS[many])}",
        f"32 compressed frames ({flops(DYCOKE)}) find {family(ttm, 'brief_event', 2)}",
        f"16 whole ones ({flops(SETTINGS[whole])}) {family(whole, 'brief_event', 2)}",
        f"({short(ttm)} and {short(whole)})",
        f"({described(whole)} against {described(ttm)})",
        f"({signed(CLAIMS[f'{over_fastv}short answers'].value)} short, "
        f"{signed(CLAIMS[f'{over_fastv}descriptions'].value)} descriptions)",
        f"({signed(CLAIMS['TTM alone is above VidCom2, short answers'].value)} short)",
        f"({difference(f'{over_prumerge}short answers')})",
        f"({difference(f'{over_prumerge}descriptions')})",
        f"({difference(once)})",
        f"loses {share(CLAIMS[highest].value)}",
        f"({difference(over_random)})",
        f"any {attends(DYCOKE)} of them",
        "**L = 1 and L = 0 hurt**",
        f"({share(SETTINGS[layer_one]['versus_full']['short']['value'], 2)} and, "
        f"with K and P of 0.9, "
        f"{share(SETTINGS[layer_zero]['versus_full']['short']['value'], 2)} on short answers)",
    ]
    assert figures_without_data(text, said) == []


def test_what_the_laboratory_took() -> None:
    text = words("docs/accuracy.md")
    assert f"({RUN['test_set']['videos']} videos)" in text and f"{len(SETTINGS)} settings" in text


BUNDLED = json.loads(FIGURES.read_text())
OF_OTHER_TRAINING = json.loads((FIGURES.parent / "accuracy-drop-tokens.json").read_text())


def test_the_table_of_the_bundled_model() -> None:
    """Is what `python -m dycoke_core.tiny evaluate` prints."""
    printed = tiny_figures.table(BUNDLED)
    assert printed.strip() in (ROOT / "docs" / "bundled-model.md").read_text()
    number = BUNDLED["questions_per_family"]
    assert f"{number} questions per family" in words("docs/bundled-model.md")
    assert f"evaluate --number {number}`" in words("docs/bundled-model.md")


def test_the_model_that_was_trained_with_tokens_missing() -> None:
    policies = OF_OTHER_TRAINING["policies"].values()
    full, dycoke = (share(policy["mean_of_short_families"]) for policy in policies)
    full_describes, dycoke_describes = (share(p["families"]["describe"]) for p in policies)
    assert (
        f"{full} of the same short questions with full tokens and {dycoke} with DyCoke, "
        f"descriptions {full_describes} and {dycoke_describes} "
    ) in words("docs/bundled-model.md")
