"""`python -m dycoke_core.tiny evaluate`: a checkpoint's accuracies on the test set, as a file.

The regression gate compares with the file in `training_log`.
"""

import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dycoke_core.config import EngineConfig
from dycoke_core.engine import Engine
from dycoke_core.tiny.evaluation import (
    Answer,
    Source,
    accuracies,
    answers,
    mean_of_short_families,
    wilson_interval,
)
from dycoke_core.tiny.questions import FAMILIES, SHORT_FAMILIES
from dycoke_core.tiny.testset import ExamScene, test_set

POLICIES = ("full", "dycoke")
NUM_FIRST = 6  # questions of each family whose scores are stored one by one


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What to evaluate, and on how many questions per family."""

    checkpoint: Path
    number: int
    source: Source = "frames"
    processes: int = 2


def evaluate(evaluation: Evaluation) -> dict[str, Any]:
    """Runs the test set under POLICIES, prints progress, and returns the figures, JSON-ready."""
    exam = test_set(evaluation.number)
    found: list[Answer] = []
    for done, part in enumerate(_answers(evaluation, exam), start=1):
        found += part
        print(f"\r{done}/{len(exam)} scenes", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    by_policy = {p: accuracies(found, place) for place, p in enumerate(POLICIES)}
    return {
        "source": evaluation.source,
        "questions_per_family": evaluation.number,
        "scenes": len(exam),
        "policies": {
            policy: {
                "mean_of_short_families": round(mean_of_short_families(by_family), 4),
                "families": {family: round(by_family[family], 4) for family in FAMILIES},
                "first_scores": first_scores(found, POLICIES.index(policy)),
            }
            for policy, by_family in by_policy.items()
        },
    }


def first_scores(found: Sequence[Answer], policy: int) -> dict[str, list[float]]:
    """Each family's first NUM_FIRST scores under one policy, in the order of the test set."""
    scores: dict[str, list[float]] = {family: [] for family in FAMILIES}
    for one in found:
        if one.policy == policy and len(scores[one.family]) < NUM_FIRST:
            scores[one.family].append(round(one.score, 4))
    return scores


def table(figures: dict[str, Any]) -> str:
    """The figures in Markdown, with 95 % intervals."""
    number = figures["questions_per_family"]
    lines = ["| family | " + " | ".join(POLICIES) + " |", "|---|" + "---|" * len(POLICIES)]
    for family in FAMILIES:
        cells = []
        for policy in POLICIES:
            mean = figures["policies"][policy]["families"][family]
            low, high = wilson_interval(mean, number)
            cells.append(f"{mean:.3f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    means = [f"{figures['policies'][p]['mean_of_short_families']:.3f}" for p in POLICIES]
    lines.append(
        f"| mean of the {len(SHORT_FAMILIES)} short families | " + " | ".join(means) + " |"
    )
    return "\n".join(lines)


def write(figures: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(figures, indent=1) + "\n")


def _answers(evaluation: Evaluation, exam: Sequence[ExamScene]) -> Iterator[list[Answer]]:
    """Answers from several single-threaded processes: faster than one process with many threads."""
    context = multiprocessing.get_context("spawn")
    setup = (evaluation.checkpoint, evaluation.source)
    with context.Pool(evaluation.processes, _Examiner.set_up, setup) as pool:
        yield from pool.imap(_Examiner.examine, exam, chunksize=1)


class _Examiner:
    """One process's engine."""

    engine: Engine
    source: Source

    @classmethod
    def set_up(cls, checkpoint: Path, source: Source) -> None:
        torch.set_num_threads(1)
        cls.engine = Engine.from_pretrained(checkpoint, EngineConfig(device="cpu"))
        cls.source = source

    @classmethod
    def examine(cls, item: ExamScene) -> list[Answer]:
        (found,) = answers(cls.engine, [item], POLICIES, source=cls.source)
        return found
