"""What the paper and this project claim about DyCoke, tested one claim at a time."""

from dataclasses import asdict, dataclass
from typing import Any

from dycoke_core.tiny.questions import FAMILIES
from loadtest.accuracy.clips import BRIEF, DESCRIPTIONS, SHORT
from loadtest.accuracy.evaluation import Outcomes
from loadtest.accuracy.settings import FULL
from loadtest.accuracy.statistics import Estimate, Paired


@dataclass(frozen=True, slots=True)
class Claim:
    """The claim that one setting's mean over some families is above another's.

    Args:
        ours, theirs: names of settings.
        families: places in FAMILIES.
        margin: 0: above by more than the interval; negative: lower by no more than this.
    """

    text: str
    ours: str
    theirs: str
    families: tuple[int, ...]
    margin: float = 0.0


_DYCOKE = "dycoke (K=0.7, L=3, P=0.7)"
_TTM_ALONE = "dycoke (K=0.7, L=3, P=0)"
_VIDCOM2 = "vidcom2, tokens of K=0.7"


def _above(control: str, k: float) -> tuple[Claim, Claim]:
    ours, theirs = f"dycoke (K={k:g}, L=3, P=0.7)", f"{control} (K={k:g})"
    text = f"TTM is above {control}, K={k:g}"
    return (
        Claim(f"{text}, brief events", ours, theirs, BRIEF),
        Claim(f"{text}, short answers", ours, theirs, SHORT),
    )


CLAIMS = (
    Claim("DyCoke is within .02 of full tokens, short answers", _DYCOKE, FULL, SHORT, -0.02),
    Claim("DyCoke is within .02 of full tokens, descriptions", _DYCOKE, FULL, DESCRIPTIONS, -0.02),
    *_above("random_ttm", 0.7),
    *_above("random_ttm", 0.9),
    *_above("fewer_frames", 0.7),
    *_above("fewer_frames", 0.9),
    Claim("TTM alone is above VidCom2, brief events", _TTM_ALONE, _VIDCOM2, BRIEF),
    Claim("TTM alone is above VidCom2, short answers", _TTM_ALONE, _VIDCOM2, SHORT),
    Claim("DyCoke is above FastV, short answers", _DYCOKE, "FastV (35 %)", SHORT),
    Claim("DyCoke is above FastV, descriptions", _DYCOKE, "FastV (35 %)", DESCRIPTIONS),
    Claim("DyCoke is above PruMerge, short answers", _DYCOKE, "PruMerge (55 %)", SHORT),
    Claim("DyCoke is above PruMerge, descriptions", _DYCOKE, "PruMerge (55 %)", DESCRIPTIONS),
    Claim(
        "Choosing anew is above choosing once, descriptions",
        _DYCOKE,
        "w/o DP: dycoke_one_shot",
        DESCRIPTIONS,
    ),
    Claim("Highest scores are above random ones, descriptions", _DYCOKE, "random_kv", DESCRIPTIONS),
    Claim("Highest scores are above lowest, descriptions", _DYCOKE, "lowest_kv", DESCRIPTIONS),
    Claim(
        "Highest scores are above lowest at P = 0.9, descriptions",
        "dycoke (K=0.7, L=3, P=0.9)",
        "lowest_kv (P=0.9)",
        DESCRIPTIONS,
    ),
)


def check_claims(outcomes: Outcomes, paired: Paired) -> list[dict[str, Any]]:
    """The verdicts on all claims whose settings were run, JSON-ready."""
    return [
        _check(claim, outcomes, paired)
        for claim in CLAIMS
        if claim.ours in outcomes and claim.theirs in outcomes
    ]


def verdict_on(difference: Estimate, margin: float) -> str:
    """Whether a difference shows that a claim holds, that it fails, or neither."""
    if difference.low > margin:
        return "holds"
    if difference.high < margin:
        return "fails"
    return "in the mean" if margin < 0 and difference.value > margin else "not shown"


def _check(claim: Claim, outcomes: Outcomes, paired: Paired) -> dict[str, Any]:
    ours, theirs = outcomes[claim.ours].in_order(), outcomes[claim.theirs].in_order()
    difference = paired.difference(ours, theirs, claim.families)
    return {
        "text": claim.text,
        "ours": claim.ours,
        "theirs": claim.theirs,
        "families": [FAMILIES[place] for place in claim.families],
        "margin": claim.margin,
        "difference": asdict(difference),
        "verdict": verdict_on(difference, claim.margin),
    }
