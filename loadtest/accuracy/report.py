"""From scores to what is published: one JSON object, which tables and charts are made from."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.tiny.questions import FAMILIES
from loadtest.accuracy.clips import DESCRIPTION, SHORT, QuestionSet
from loadtest.accuracy.evaluation import Outcomes
from loadtest.accuracy.settings import FULL, Setting, cost_of
from loadtest.accuracy.statistics import Estimate, Paired, mcnemar
from loadtest.engine import environment

BRIEF = (FAMILIES.index("brief_event"),)
BRIEF_AND_COUNT = (*BRIEF, FAMILIES.index("action_count"))
DESCRIPTIONS = (DESCRIPTION,)
DEFAULTS = "dycoke (K=0.7, L=3, P=0.7)"


@dataclass(frozen=True, slots=True)
class Claim:
    """That one setting's mean over some families is above another's.

    Args:
        margin: 0: above by more than the interval; below 0: no lower than by so much.
    """

    text: str
    ours: str
    theirs: str
    families: tuple[int, ...]
    margin: float = 0.0


CLAIMS = (
    Claim(
        "DyCoke's defaults are within .02 of full tokens, short answers",
        DEFAULTS,
        FULL,
        SHORT,
        -0.02,
    ),
    Claim("and on descriptions", DEFAULTS, FULL, DESCRIPTIONS, -0.02),
    *(
        Claim(
            f"TTM is above {control} on brief events, K={k:g}",
            f"dycoke (K={k:g}, L=3, P=0.7)",
            f"{control} (K={k:g})",
            BRIEF,
        )
        for control in ("random_ttm", "fewer_frames")
        for k in (0.7, 0.9)
    ),
    *(
        Claim(
            f"TTM is above {control} over all short answers, K={k:g}",
            f"dycoke (K={k:g}, L=3, P=0.7)",
            f"{control} (K={k:g})",
            SHORT,
        )
        for control in ("random_ttm", "fewer_frames")
        for k in (0.7, 0.9)
    ),
    Claim(
        "TTM alone is above VidCom2 at as many tokens, short answers",
        "dycoke (K=0.7, L=3, P=0)",
        "vidcom2, tokens of K=0.7",
        SHORT,
    ),
    Claim("and on brief events", "dycoke (K=0.7, L=3, P=0)", "vidcom2, tokens of K=0.7", BRIEF),
    Claim("DyCoke is above FastV, short answers", DEFAULTS, "FastV (L=3, 35 %)", SHORT),
    Claim("DyCoke is above PruMerge, short answers", DEFAULTS, "PruMerge (55 %)", SHORT),
    Claim(
        "Choosing anew is above choosing once, descriptions",
        DEFAULTS,
        "w/o DP: dycoke_one_shot",
        DESCRIPTIONS,
    ),
    Claim(
        "The highest scores are above random ones, descriptions",
        DEFAULTS,
        "random_kv",
        DESCRIPTIONS,
    ),
    Claim(
        "The highest scores are above the lowest, descriptions", DEFAULTS, "lowest_kv", DESCRIPTIONS
    ),
    Claim("and with P = 0.9", "dycoke (K=0.7, L=3, P=0.9)", "lowest_kv (P=0.9)", DESCRIPTIONS),
)


def make_report(
    model: LlavaOnevision,
    questions: QuestionSet,
    tables: dict[str, list[Setting]],
    outcomes: Outcomes,
) -> dict[str, Any]:
    """Everything that was measured, as JSON knows it."""
    paired = Paired(questions.videos, questions.families, len(FAMILIES))
    settings = {setting.name: setting for rows in tables.values() for setting in rows}
    return {
        "environment": {
            **environment(),
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "model": _model(model),
        "test_set": {
            "videos": len(questions.clips),
            "questions": {
                family: int((questions.families == place).sum())
                for place, family in enumerate(FAMILIES)
            },
        },
        "settings": {
            name: {
                **_what(setting, model),
                **_how_well(name, outcomes, questions, paired),
            }
            for name, setting in settings.items()
        },
        "claims": [
            _checked(claim, outcomes, paired) for claim in CLAIMS if _is_known(claim, outcomes)
        ],
        "tables": {table: [setting.name for setting in rows] for table, rows in tables.items()},
    }


def _what(setting: Setting, model: LlavaOnevision) -> dict[str, Any]:
    cost = cost_of(setting, model.text_geometry, model.tokens_per_frame)
    is_policy = setting.method == "policy"
    return {
        "method": setting.method,
        "compression": setting.compression.as_dict() if is_policy else None,
        "num_frames": setting.num_frames,
        **asdict(cost),
        "retained_ratio": cost.retained_ratio,
    }


def _how_well(
    name: str, outcomes: Outcomes, questions: QuestionSet, paired: Paired
) -> dict[str, Any]:
    ours, full = outcomes[name].in_order(), outcomes[FULL].in_order()
    is_short = np.isin(questions.families, SHORT)
    return {
        "families": {
            family: float(ours[questions.families == place].mean())
            for place, family in enumerate(FAMILIES)
        },
        "short": asdict(paired.mean(ours, SHORT)),
        "describe": asdict(paired.mean(ours, DESCRIPTIONS)),
        "versus_full": {
            "short": asdict(paired.difference(ours, full, SHORT)),
            "describe": asdict(paired.difference(ours, full, DESCRIPTIONS)),
            "mcnemar": asdict(mcnemar(ours[is_short], full[is_short])),
        },
        "refresh_rate": outcomes[name].refresh_rate,
    }


def _is_known(claim: Claim, outcomes: Outcomes) -> bool:
    return claim.ours in outcomes and claim.theirs in outcomes


def _checked(claim: Claim, outcomes: Outcomes, paired: Paired) -> dict[str, Any]:
    difference = paired.difference(
        outcomes[claim.ours].in_order(), outcomes[claim.theirs].in_order(), claim.families
    )
    return {
        "text": claim.text,
        "ours": claim.ours,
        "theirs": claim.theirs,
        "families": [FAMILIES[place] for place in claim.families],
        "margin": claim.margin,
        "difference": asdict(difference),
        "verdict": verdict_on(difference, claim.margin),
    }


def verdict_on(difference: Estimate, margin: float) -> str:
    """Whether a difference shows that the claim holds, that it fails, or neither."""
    if difference.low > margin:
        return "holds"
    if difference.high < margin:
        return "fails"
    return "in the mean" if margin < 0 and difference.value > margin else "not shown"


def _model(model: LlavaOnevision) -> dict[str, Any]:
    return {
        "weights_digest": model.weights_digest,
        "tokens_per_frame": model.tokens_per_frame,
        **asdict(model.text_geometry),
    }


def settings_in(report: dict[str, Any], table: str) -> Sequence[tuple[str, dict[str, Any]]]:
    """The rows of a table, in order."""
    return [(name, report["settings"][name]) for name in report["tables"][table]]
