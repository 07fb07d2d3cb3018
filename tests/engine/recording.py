"""An engine that remembers, per sequence, what each token was chosen from; and synthetic clips."""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dycoke_core.config import EngineConfig
from dycoke_core.engine.backend import Pending, StepPlan
from dycoke_core.engine.engine import Engine
from dycoke_core.engine.state import SequenceState
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import (
    ChatMessage,
    CompressionConfig,
    SamplingParams,
    Sequence,
    SequenceReport,
    TokenEvent,
)

MAX_STEPS = 10_000  # of a test; one that needs more waits for something that never comes


@dataclass(repr=False)
class Recording:
    logits: list[Tensor] = field(default_factory=list)  # float32 [vocabulary], one per token
    kept: list[Tensor] = field(default_factory=list)  # of the step that led to the token
    refreshes: list[int] = field(default_factory=list)


class RecordingEngine(Engine):
    """Keeps the logits of every token that was sampled and the kept set of every decode step."""

    def __init__(self, model: LlavaOnevision, config: EngineConfig | None = None) -> None:
        super().__init__(model, config or EngineConfig(), observer=self._record)
        self.recordings: dict[str, Recording] = defaultdict(Recording)
        self._num_forced: dict[str, int] = {}
        self._preempted_before: dict[str, int] = defaultdict(int)

    def _record(self, plan: StepPlan, states: tuple[SequenceState, ...], pending: Pending) -> None:
        logits = iter(pending.logits.cpu().clone())
        for row, state in zip(plan.answering, states, strict=True):
            recording = self.recordings[state.sequence.sequence_id]
            self._begin_again_if_preempted(state, recording)
            if row.draw is not None:
                recording.logits.append(next(logits))
            view = self.backend.view(row.seat)
            if view.kept is not None:
                recording.kept.append(view.kept.cpu().clone())
                recording.refreshes.append(view.num_refreshes)

    def _begin_again_if_preempted(self, state: SequenceState, recording: Recording) -> None:
        """A replay repeats all steps, and draws what was not known yet."""
        name = state.sequence.sequence_id
        if state.num_preemptions > self._preempted_before[name]:
            self._preempted_before[name] = state.num_preemptions
            del recording.logits[state.num_forced - self._num_forced[name] :]
            recording.kept.clear()
            recording.refreshes.clear()

    def run(self, *sequences: Sequence) -> dict[str, list[TokenEvent]]:
        """Adds the sequences and steps until all have ended; events by sequence."""
        for sequence in sequences:
            self.add(sequence)
        return self.drain()

    def drain(self) -> dict[str, list[TokenEvent]]:
        events: dict[str, list[TokenEvent]] = defaultdict(list)
        for _ in range(MAX_STEPS):
            if not self.has_work:
                return events
            for event in self.step():
                events[event.sequence_id].append(event)
        raise AssertionError("sequences wait for what never comes")

    def step(self) -> list[TokenEvent]:
        events = super().step()
        for event in events:
            if event.finish_reason is not None:
                self._trim(event)
        return events

    def _trim(self, end: TokenEvent) -> None:
        """Drops what a device that lags a step behind has computed after the last token."""
        recording = self.recordings[end.sequence_id]
        num_tokens = end.index + len(end.token_ids)
        num_sampled = max(num_tokens - self._num_forced.pop(end.sequence_id), 0)
        num_steps = max(num_tokens - 1, 0)
        del recording.logits[num_sampled:], recording.kept[num_steps:]
        del recording.refreshes[num_steps:]

    def add(self, sequence: Sequence) -> str:
        prefix_key = super().add(sequence)
        self._num_forced[sequence.sequence_id] = len(sequence.forced_token_ids)
        return prefix_key


def report_of(events: list[TokenEvent]) -> SequenceReport:
    assert events[-1].report is not None, events[-1].error
    return events[-1].report


def counts(report: SequenceReport) -> tuple[object, ...]:
    """All of a report that is no measurement."""
    memory = report.memory
    sizes = (memory.kv_bytes, memory.dp_cache_bytes, memory.kv_bytes_full_tokens)
    numbers = (report.prompt_tokens, report.completion_tokens, report.text)
    return (*numbers, report.compression, *sizes, report.cache)


def steps_until_tokens(engine: RecordingEngine, name: str, num_tokens: int) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while len(engine.states[name].sequence.output_token_ids) < num_tokens:
        events += engine.step()
    return events


def moving_square(seed: int, num_frames: int = 8, size: int = 224) -> npt.NDArray[np.uint8]:
    """A noisy clip of one square on a plain background: uint8 [F, size, size, 3]."""
    rng = np.random.default_rng(seed)
    background, color = rng.integers(0, 256, (2, 3))
    start, speed = rng.integers(10, 120, 2), rng.integers(-4, 5, 2)
    side = 50 * size // 224
    frames = np.empty((num_frames, size, size, 3), np.int16)
    frames[:] = background
    for index, frame in enumerate(frames):
        y, x = (start + speed * index) % (size - side)
        frame[y : y + side, x : x + side] = color
    noisy = frames + rng.integers(-4, 5, frames.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def make_sequence(
    name: str = "a",
    *,
    video: int = 1,
    num_frames: int = 8,
    question: str = "Describe the video.",
    max_tokens: int = 12,
    compression: str | dict[str, object] = "dycoke",
    forced: tuple[int, ...] = (),
    image_size: int = 224,
    **sampling: object,
) -> Sequence:
    return Sequence(
        sequence_id=name,
        messages=(ChatMessage("user", question),),
        frames=moving_square(video, num_frames, image_size),
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
        compression=CompressionConfig.parse(compression),
        forced_token_ids=forced,
    )


def assert_same(actual: Recording, expected: Recording) -> None:
    assert_same_logits(actual.logits, expected.logits)
    assert_same_kept(actual.kept, expected.kept)
    assert actual.refreshes == expected.refreshes


def assert_same_logits(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Within 1e-4 of the largest; argmax equal unless the reference's top two are within 1e-3."""
    assert len(actual) == len(expected)
    for mine, reference in zip(actual, expected, strict=True):
        assert (mine - reference).abs().max() <= 1e-4 * reference.abs().max()
        top = reference.topk(2).values
        if top[0] - top[1] >= 1e-3:
            assert mine.argmax() == reference.argmax()


def assert_same_kept(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for mine, reference in zip(actual, expected, strict=True):
        assert torch.equal(mine, reference)
