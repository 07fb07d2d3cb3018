"""Turns scores into one JSON object, from which tables and charts are made."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dycoke_core.model.adapter import VideoLanguageModel
from dycoke_core.tiny.questions import FAMILIES
from loadtest.accuracy.claims import check_claims
from loadtest.accuracy.clips import DESCRIPTIONS, SHORT, QuestionSet
from loadtest.accuracy.evaluation import Outcomes
from loadtest.accuracy.settings import FULL, Setting, Sizes, cost_of
from loadtest.accuracy.statistics import Paired, mcnemar


def make_report(
    model: VideoLanguageModel,
    questions: QuestionSet,
    tables: dict[str, list[Setting]],
    outcomes: Outcomes,
    measured_with: dict[str, Any],
    left_out: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that was measured, JSON-ready.

    Args:
        measured_with: the machine, as it was before the run.
        left_out: settings of the tables that this family cannot run.
    """
    sizes = Sizes.of(model)
    paired = Paired(questions.videos, questions.families, len(FAMILIES))
    settings = {setting.name: setting for rows in tables.values() for setting in rows}
    return {
        "environment": {
            **measured_with,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "model": _model(model, sizes),
        "test_set": {
            "videos": len(questions.clips),
            "questions": {
                family: int((questions.families == place).sum())
                for place, family in enumerate(FAMILIES)
            },
        },
        "settings": {
            name: {
                **_what(setting, sizes),
                **_how_well(name, outcomes, questions, paired),
            }
            for name, setting in settings.items()
        },
        "left_out": list(left_out),
        "claims": check_claims(outcomes, paired),
        "tables": {table: [setting.name for setting in rows] for table, rows in tables.items()},
    }


def _what(setting: Setting, sizes: Sizes) -> dict[str, Any]:
    cost = cost_of(setting, sizes)
    is_policy = setting.method == "policy"
    return {
        "method": setting.method,
        "compression": setting.compression.as_dict() if is_policy else None,
        "layer": setting.layer or None,
        "num_frames": setting.num_frames,
        **asdict(cost),
        "retained_ratio": cost.retained_ratio,
        "retained_ratio_decode_all_layers": cost.visual_tokens_decode_mean / cost.visual_tokens_in,
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


def _model(model: VideoLanguageModel, sizes: Sizes) -> dict[str, Any]:
    return {
        "architecture": model.architecture,
        "weights_digest": model.weights_digest,
        "tokens_per_unit": sizes.tokens_per_unit,
        "frames_per_unit": sizes.frames_per_unit,
        **asdict(model.text_geometry),
    }


def settings_in(report: dict[str, Any], table: str) -> Sequence[tuple[str, dict[str, Any]]]:
    """The rows of a table, in order."""
    return [(name, report["settings"][name]) for name in report["tables"][table]]
