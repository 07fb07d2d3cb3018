"""How often stage II refreshes, and how much of a kept set it replaces.

Counted while a model describes scenes of the synthetic test set, at DyCoke's defaults. This decides
what a refresh may cost: with random weights attention hardly follows the content, with trained ones
it does.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from dycoke_core.config import CompressionConfig, EngineConfig
from dycoke_core.engine import Engine, SamplingParams, Sequence
from dycoke_core.engine.backend import Pending, StepPlan
from dycoke_core.engine.state import SequenceState
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import ChatMessage
from dycoke_core.tiny.questions import DESCRIBE
from dycoke_core.tiny.render import render
from dycoke_core.tiny.testset import MAX_TOKENS, test_set


@dataclass(frozen=True)
class Refreshes:
    """rate: selections per decode step after the first. turnover: share of the kept set that a
    selection replaces, on average. steps: decode steps counted."""

    rate: float
    turnover: float
    steps: int


def count_refreshes(model: LlavaOnevision, *, num_scenes: int = 8) -> Refreshes:
    steps: list[tuple[Tensor, int]] = []  # the kept set and the refreshes so far, of each step

    def observe(plan: StepPlan, states: tuple[SequenceState, ...], pending: Pending) -> None:
        for row in plan.decode:
            view = engine.backend.view(row.seat)
            assert view.kept is not None
            steps.append((view.kept, view.num_refreshes))

    engine = Engine(model, EngineConfig(device=str(model.device)), observer=observe)
    num_steps, turnovers = 0, []
    for exam in test_set(num_scenes, families=(DESCRIBE,)):
        steps.clear()
        engine.add(
            Sequence(
                sequence_id="exam",
                messages=(ChatMessage("user", exam.questions[0].text),),
                frames=render(exam.scene),
                sampling=SamplingParams(max_tokens=MAX_TOKENS[DESCRIBE]),
                compression=CompressionConfig(),
            )
        )
        while engine.has_work:
            engine.step()
        for (before, count_before), (after, count) in itertools.pairwise(steps):
            num_steps += 1
            if count > count_before:
                turnovers.append(1 - torch.isin(after, before).float().mean().item())
        engine.clear_caches()
    turnover = sum(turnovers) / len(turnovers) if turnovers else 0.0
    return Refreshes(len(turnovers) / max(num_steps, 1), turnover, num_steps)
