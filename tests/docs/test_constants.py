"""Numbers in the documents' sentences are the constants of the code."""

import re

import pytest

from app.api.auth import MAX_STALE_S
from app.api.signed_links import LINK_LIFE_S
from app.keys.entries import MIN_KEY_CHARS
from app.store.owner_limits import FRAME_COST
from app.store.queue_snapshot import LAST_ARRIVALS
from app.store.usage import USAGE_DAYS
from dycoke_core.engine.auto_compression import COMMITTED_SHARE
from dycoke_core.kept_sets import MAX_HISTORY_BYTES
from dycoke_core.level_choice import EASED_UTILISATION, LINE_SHARE, MAX_UTILISATION, QUIET_SHARE
from dycoke_core.precedence import MAX_OVERTAKES
from tests.docs.documents import ROOT
from tests.docs.figures import run
from tests.docs.tables import words
from tests.docs.test_request_path import MAX_CLASSES, MAX_FILES

TIMES = "\N{MULTIPLICATION SIGN}"
NUMBERS = {2: "two", 4: "four", 5: "five", 8: "eight", 10: "ten"}
SHARES = {1 / 8: "an eighth", 0.2: "a fifth", 0.25: "a quarter"}


def lua(name: str) -> int:
    """The value of a local of the Redis scripts; products are written out."""
    texts = (path.read_text() for path in (ROOT / "app" / "store" / "lua").glob("*.lua"))
    pattern = re.compile(rf"^local {name} = ([\d *]+)", flags=re.MULTILINE)
    (value,) = {found for text in texts for found in pattern.findall(text)}
    product = 1
    for factor in value.split("*"):
        product *= int(factor)
    return product


ORDINALS = {2: "second", 5: "fifth"}
SENTENCES = {
    "docs/keys.md": [
        f"counts for {MAX_STALE_S:g} seconds",
        f"for {NUMBERS[LINK_LIFE_S // 60]} minutes, and for as long as its key is",
        f"`{FRAME_COST} {TIMES} frames + max_tokens`",
        f"`?days=`, up to {USAGE_DAYS})",
        f"every {ORDINALS[MAX_OVERTAKES + 1]} turn goes to the key's oldest job",
        f"by the key's {MAX_OVERTAKES + 1} {TIMES} (n + 1)-th turn",
    ],
    "docs/operations.md": [
        f"The {ORDINALS[lua('MAX_DEATHS')]} such death ends the job",
        f"fewer than {NUMBERS[lua('FURTHER_TOKENS')]} tokens",
        f"until it has made {lua('PROBATION_TOKENS')} more tokens",
        f"After {NUMBERS[lua('MAX_DELIVERIES')]} deliveries",
        f"passed over at most {NUMBERS[MAX_OVERTAKES]} times in a row",
        f"at the latest as the {MAX_OVERTAKES + 1} {TIMES} (n + 1)-th",
        f"about {run('scrape.json')['rows'][-1]['page_bytes'] / 1000:.0f} KB before",
    ],
    "docs/compression.md": [
        f"the last {lua('MAX_ARRIVALS')} arrivals, or of the last {LAST_ARRIVALS}",
        f"reaches {MAX_UTILISATION:g}",
        f"is below {EASED_UTILISATION:g}",
        f"at most {SHARES[COMMITTED_SHARE]} of the objective",
        f"keeping {SHARES[round(1 - LINE_SHARE, 6)]} of the objective in reserve",
        f"more than {SHARES[QUIET_SHARE]} of the objective",
    ],
    "docs/api.md": [
        f"once {NUMBERS[lua('MIN_PACE')]} jobs have left a queue",
        f"in at most {MAX_HISTORY_BYTES // 2**10} KiB",
    ],
    "docs/settings.md": [
        f"exceed {lua('MAX_ENDED_BYTES') // 2**20} MiB",
        f"keys of at least {MIN_KEY_CHARS} characters",
    ],
}


def test_the_queue_and_the_engine_have_one_rule() -> None:
    assert lua("MAX_OVERTAKES") == MAX_OVERTAKES


@pytest.mark.parametrize("document", SENTENCES)
def test_sentences_say_the_constants(document: str) -> None:
    text = words(document)
    assert [phrase for phrase in SENTENCES[document] if phrase not in text] == []


def test_launches_of_a_decode_step() -> None:
    steps = run("launches.json")["steps"]
    totals = {p: {s["total"] for s in steps if s["policy"] == p} for p in ("full", "dycoke")}
    ((full,), (dycoke,)) = totals.values()
    text = words("docs/gpu.md")
    assert f"at {run('launches.json')['layers']} layers" in text
    assert f"{full} with full tokens, {dycoke} with DyCoke" in text


def test_how_much_a_stranger_opens_is_little_less_than_the_budget() -> None:
    (said,) = re.findall(r"(\d+) files and (\d+) classes", words("docs/architecture.md"))
    for number, budget in zip(said, (MAX_FILES, MAX_CLASSES), strict=True):
        assert budget - 6 <= int(number) <= budget


def test_the_laboratory_takes_as_long_wherever_it_is_said() -> None:
    (minutes,) = re.findall(r"in (\d+) minutes on two cores", words("README.md"))
    assert f"and {minutes} at the default" in words("docs/accuracy.md")
