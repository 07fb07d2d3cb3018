"""Spreads videos over processes: on a CPU two single-threaded ones beat one with two threads."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from transformers.utils import logging as transformers_logging

from dycoke_core.engine import Engine
from dycoke_core.model.adapter import VideoLanguageModel
from dycoke_core.model.loader import load_model
from loadtest.accuracy.clips import Clip, QuestionSet
from loadtest.accuracy.evaluation import Laboratory, Outcome, Outcomes, open_engine
from loadtest.accuracy.settings import Setting

CLIPS_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class ModelSource:
    """How each process loads the model."""

    path: str
    device: str = "auto"
    dtype: str = "auto"

    def load(self) -> VideoLanguageModel:
        transformers_logging.disable_progress_bar()
        return load_model(self.path, device=self.device, dtype=self.dtype)


def evaluate(
    source: ModelSource,
    questions: QuestionSet,
    settings: Sequence[Setting],
    *,
    engine: Engine | None = None,
    num_processes: int = 1,
    on_clips: Callable[[int], object] = lambda _: None,
) -> Outcomes:
    """Every setting's answers to every question.

    Args:
        engine: of a model from that source, to ask here, with all of torch's threads; None: in
            `num_processes` others, each of which loads the model.
        on_clips: called with numbers of videos that are done.
    """
    clips = questions.clips
    groups = [clips[i : i + CLIPS_AT_ONCE] for i in range(0, len(clips), CLIPS_AT_ONCE)]
    outcomes = {setting.name: Outcome() for setting in settings}
    if engine is None:
        examined = _examine_apart(source, settings, groups, num_processes)
    else:
        examined = map(Laboratory(engine, settings).examine, groups)
    for group, found in zip(groups, examined, strict=True):
        for name, outcome in found.items():
            outcomes[name].add(outcome)
        on_clips(len(group))
    return outcomes


def _examine_apart(
    source: ModelSource,
    settings: Sequence[Setting],
    groups: Sequence[Sequence[Clip]],
    num_processes: int,
) -> Iterator[Outcomes]:
    """The groups' outcomes, in order."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, _open_laboratory, (source, settings)) as pool:
        yield from pool.map(_examine_group, groups)


# One in each process of the pool, which has nowhere else to keep it.
_laboratory: Laboratory | None = None


def _open_laboratory(source: ModelSource, settings: Sequence[Setting]) -> None:
    global _laboratory
    torch.set_num_threads(1)
    _laboratory = Laboratory(open_engine(source.load()), settings)


def _examine_group(clips: Sequence[Clip]) -> Outcomes:
    assert _laboratory is not None, "the pool's initializer has run"
    return _laboratory.examine(clips)
