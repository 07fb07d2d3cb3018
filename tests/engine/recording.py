"""An engine that remembers, per sequence, what each token was chosen from; and synthetic clips."""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dycoke_core.engine.engine import Engine
from dycoke_core.engine.state import SequenceState
from dycoke_core.sequence import (
    ChatMessage,
    CompressionConfig,
    SamplingParams,
    Sequence,
    SequenceReport,
    TokenEvent,
)


@dataclass
class Recording:
    logits: list[Tensor] = field(default_factory=list)  # float32 [vocabulary], one per token
    kept: list[Tensor] = field(default_factory=list)  # of the step that led to the token
    refreshes: list[int] = field(default_factory=list)


class RecordingEngine(Engine):
    """Keeps the logits of every token that was sampled and the kept set of every decode step."""

    recordings: dict[str, Recording]

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.recordings = defaultdict(Recording)

    def _sample(self, states: list[SequenceState], logits: Tensor) -> list[int]:
        for state, row in zip(states, logits, strict=True):
            self.recordings[state.sequence.sequence_id].logits.append(row.clone())
        return super()._sample(states, logits)

    def _append_token(self, state: SequenceState, sampled: int | None) -> TokenEvent | None:
        recording = self.recordings[state.sequence.sequence_id]
        pruner = state.kv.pruner if state.kv is not None else None
        if pruner is not None and pruner.kept is not None:
            recording.kept.append(pruner.kept.clone())
            recording.refreshes.append(int(pruner.num_refreshes or 0))
        return super()._append_token(state, sampled)

    def run(self, *sequences: Sequence) -> dict[str, list[TokenEvent]]:
        """Adds the sequences and steps until all have ended; events by sequence."""
        for sequence in sequences:
            self.add(sequence)
        return self.drain()

    def drain(self) -> dict[str, list[TokenEvent]]:
        events: dict[str, list[TokenEvent]] = defaultdict(list)
        while self.has_work:
            for event in self.step():
                events[event.sequence_id].append(event)
        return events


def report_of(events: list[TokenEvent]) -> SequenceReport:
    assert events[-1].report is not None, events[-1].error
    return events[-1].report


def moving_square(seed: int, num_frames: int = 8, size: int = 224) -> npt.NDArray[np.uint8]:
    """A noisy clip of one square on a plain background: uint8 [F, size, size, 3]."""
    rng = np.random.default_rng(seed)
    background, color = rng.integers(0, 256, (2, 3))
    start, speed = rng.integers(10, 120, 2), rng.integers(-4, 5, 2)
    frames = np.empty((num_frames, size, size, 3), np.int16)
    frames[:] = background
    for index, frame in enumerate(frames):
        y, x = (start + speed * index) % (size - 50)
        frame[y : y + 50, x : x + 50] = color
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
    **sampling: object,
) -> Sequence:
    return Sequence(
        sequence_id=name,
        messages=(ChatMessage("user", question),),
        frames=moving_square(video, num_frames),
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
        compression=CompressionConfig.parse(compression),
        forced_token_ids=forced,
    )


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
