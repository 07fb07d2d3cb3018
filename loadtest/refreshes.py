"""How often stage II selects anew, and how much of a kept set it exchanges.

Counted while a model describes scenes of the synthetic test set, at DyCoke's defaults. Decides what
a refresh may cost: with random weights attention hardly follows the content, with trained ones it
does.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from dycoke_core.config import CompressionConfig, EngineConfig
from dycoke_core.engine import Engine, SamplingParams, Sequence
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import ChatMessage
from dycoke_core.tiny.questions import DESCRIBE
from dycoke_core.tiny.render import render
from dycoke_core.tiny.testset import MAX_TOKENS, test_set


@dataclass(frozen=True)
class Refreshes:
    """rate: selections per decode step after the first. turnover: share of the kept set that a
    selection exchanges, on average. steps: decode steps counted."""

    rate: float
    turnover: float
    steps: int


def count_refreshes(model: LlavaOnevision, *, num_scenes: int = 8) -> Refreshes:
    engine = Engine(model, EngineConfig(device=str(model.device)))
    num_steps, turnovers = 0, []
    for exam in test_set(num_scenes, families=(DESCRIBE,)):
        sequence = Sequence(
            sequence_id="exam",
            messages=(ChatMessage("user", exam.questions[0].text),),
            frames=render(exam.scene),
            sampling=SamplingParams(max_tokens=MAX_TOKENS[DESCRIBE]),
            compression=CompressionConfig(),
        )
        steps = _selections(engine, sequence)
        for (before, count_before), (after, count) in itertools.pairwise(steps):
            num_steps += 1
            if count > count_before:
                turnovers.append(1 - torch.isin(after, before).float().mean().item())
        engine.clear_caches()
    turnover = sum(turnovers) / len(turnovers) if turnovers else 0.0
    return Refreshes(len(turnovers) / max(num_steps, 1), turnover, num_steps)


def _selections(engine: Engine, sequence: Sequence) -> list[tuple[Tensor, int]]:
    """The kept set and the refreshes so far, after each decode step; the last one's are gone."""
    engine.add(sequence)
    steps = []
    while engine.has_work:
        engine.step()
        state = engine._states.get(sequence.sequence_id)
        pruner = state.kv.pruner if state is not None and state.kv is not None else None
        if pruner is not None and pruner.kept is not None:
            steps.append((pruner.kept, int(pruner.num_refreshes or 0)))
    return steps
