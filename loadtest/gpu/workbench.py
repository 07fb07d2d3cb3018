"""A model with random weights, its engine, and batches of sequences that decode.

Uses only the engine's public interface. Videos are prefilled once per stage I: `Engine` keeps their
prefixes, so a batch of any policy starts with its questions.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dycoke_core.config import MAX_LAYER, CompressionConfig, EngineConfig
from dycoke_core.engine import Engine, SamplingParams, Sequence
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import ChatMessage, SequenceReport, Stage, TokenEvent
from loadtest.geometry import Geometry, random_llava_onevision
from loadtest.gpu.sizes import Sizes
from loadtest.gpu.timing import StepTimes, time_steps

Compression = Mapping[str, Any]

# The backend of the engines under test, in Triton's interpreter if there is no GPU.
BACKEND: dict[str, Any] = {"backend": "cuda"}


@dataclass(frozen=True, slots=True)
class Policies:
    """What is compared. All but `full` share a video's prefix.

    Args:
        ttm: stage II is off, as L is beyond the model's layers.
        refreshing: the gate stays shut only at a cosine of 1; reports say how often it opened.
    """

    full: Compression
    ttm: Compression
    dycoke: Compression
    refreshing: Compression

    @classmethod
    def create(cls, first_pruned_layer: int) -> "Policies":
        dycoke = {"policy": "dycoke", "l": first_pruned_layer}
        return cls(
            full={"policy": "full"},
            ttm={"policy": "dycoke", "l": MAX_LAYER},
            dycoke=dycoke,
            refreshing={**dycoke, "threshold": 1.0},
        )


@dataclass(frozen=True, slots=True)
class Decoded:
    times: StepTimes
    reports: tuple[SequenceReport, ...]

    @property
    def refresh_rate(self) -> float:
        """Refreshes per decode step after the first, over all sequences."""
        steps = sum(max(r.compression.decode_steps - 1, 0) for r in self.reports)
        return sum(r.compression.refreshes for r in self.reports) / max(steps, 1)

    @property
    def prefix_hit_rate(self) -> float:
        return sum(r.cache.has_prefix_hit for r in self.reports) / max(len(self.reports), 1)


@dataclass(slots=True)
class Workbench:
    model: LlavaOnevision
    engine: Engine
    sizes: Sizes
    policies: Policies
    question: str
    build_s: float
    _filled: dict[str, int] = field(default_factory=dict)  # number of videos by stage I
    _reports: dict[str, SequenceReport] = field(default_factory=dict)  # latest by compression
    _num_sequences: int = 0

    @classmethod
    def build(
        cls,
        geometry: Geometry,
        sizes: Sizes,
        device: torch.device,
        *,
        kv_bytes: int,
        backend: Mapping[str, Any] = BACKEND,
    ) -> "Workbench":
        started_at = time.perf_counter()
        model = random_llava_onevision(geometry, device=str(device), dtype=sizes.dtype)
        config = EngineConfig(
            device=str(device),
            max_running_sequences=sizes.wide_batch,
            kv_cache_bytes=kv_bytes,
            feature_cache_bytes=sizes.feature_bytes,
            **backend,
        )
        engine = Engine(model, config)
        question = question_of(model, sizes.num_text_tokens)
        policies = Policies.create(sizes.first_pruned_layer)
        seconds = time.perf_counter() - started_at
        return cls(model, engine, sizes, policies, question, seconds)

    def sequence(
        self,
        compression: Compression,
        frames: npt.NDArray[np.uint8],
        video_key: str,
        *,
        max_tokens: int,
        system: str | None = None,
        **sampling: Any,
    ) -> Sequence:
        """Args: system: text before the video, which gives the video its own prefix."""
        self._num_sequences += 1
        turns = [] if system is None else [ChatMessage("system", system)]
        return Sequence(
            sequence_id=str(self._num_sequences),
            messages=(*turns, ChatMessage("user", self.question)),
            frames=frames,
            sampling=SamplingParams(max_tokens=max_tokens, **sampling),
            compression=CompressionConfig.parse(compression),
            video_key=video_key,
        )

    def fill(self, compression: Compression, num_videos: int) -> None:
        """Prefills the first videos' prefixes that the engine does not have yet."""
        key = "full" if compression["policy"] == "full" else "dycoke"
        for video in range(self._filled.get(key, 0), num_videos):
            self.engine.add(self._known_video(compression, video, max_tokens=1))
        self.drain()
        self._filled[key] = max(num_videos, self._filled.get(key, 0))

    def forget_videos(self) -> None:
        """To be called after the engine's caches were cleared."""
        self._filled.clear()

    def decode(
        self,
        compression: Compression,
        batch: int,
        *,
        num_videos: int | None = None,
        **sampling: Any,
    ) -> Decoded:
        """Times steps of a batch that only decodes; the answers then run to their end.

        Args:
            num_videos: how many videos the sequences ask about; None: each about its own.
        """
        steps = self.sizes.num_steps
        with self.decoding(compression, batch, num_videos=num_videos, **sampling) as finish:
            times = time_steps(self.engine, steps)
            if abs(times.num_tokens - batch * steps) > batch:
                raise RuntimeError(f"{times.num_tokens} tokens in {steps} steps of {batch}")
            decoded = Decoded(times, finish())
        self._reports[repr(compression)] = decoded.reports[-1]
        return decoded

    def last_report(self, compression: Compression) -> SequenceReport:
        """The report of a sequence in the latest batch with this compression."""
        return self._reports[repr(compression)]

    @contextmanager
    def decoding(
        self,
        compression: Compression,
        batch: int,
        *,
        num_videos: int | None = None,
        num_steps: int | None = None,
        **sampling: Any,
    ) -> Iterator[Callable[[], tuple[SequenceReport, ...]]]:
        """A batch that has warmed up and decodes for at least `num_steps` more.

        Yields:
            A function that runs the answers to their end and returns their reports. Without it
            they are aborted.
        """
        num_videos = num_videos or batch
        sizes, engine = self.sizes, self.engine
        self.fill(compression, num_videos)
        num_needed = sizes.num_warm_steps + (num_steps or sizes.num_steps) + 2
        sequences = [
            self._known_video(
                compression, index % num_videos, max_tokens=num_needed + sizes.stagger, **sampling
            )
            for index in range(batch)  # questions about one video are not adjacent
        ]
        for sequence in sequences:
            engine.add(sequence)
        try:
            while any(sequence.stage is not Stage.DECODING for sequence in sequences):
                check(engine.step())
            ahead = max(len(sequence.output_token_ids) for sequence in sequences)
            if ahead > sizes.stagger:
                raise RuntimeError(f"the first sequence is {ahead} tokens ahead of the last")
            for _ in range(sizes.num_warm_steps):
                check(engine.step())
            yield self.drain
        finally:
            for sequence in sequences:
                engine.abort(sequence.sequence_id)

    def drain(self) -> tuple[SequenceReport, ...]:
        """Steps until nothing is left; returns the reports of what ended."""
        reports = []
        while self.engine.has_work:
            events = check(self.engine.step())
            reports += [event.report for event in events if event.report is not None]
        return tuple(reports)

    def first_token_seconds(self, sequence: Sequence) -> tuple[float, SequenceReport]:
        """Seconds from `add` to the first token's event in an otherwise empty engine."""
        started_at = time.perf_counter()
        self.engine.add(sequence)
        events: list[TokenEvent] = []
        while not any(event.token_ids for event in events):
            events = check(self.engine.step())
        seconds = time.perf_counter() - started_at
        ended = [event.report for event in events if event.report is not None]
        return seconds, (*ended, *self.drain())[-1]

    def _known_video(self, compression: Compression, video: int, **sampling: Any) -> Sequence:
        frames = few_frames(self.sizes, video, self.model.image_size)
        return self.sequence(compression, frames, f"video {video}", **sampling)


def check(events: list[TokenEvent]) -> list[TokenEvent]:
    """Raises if a sequence failed: every figure around it would be worthless."""
    for event in events:
        if event.error is not None:
            raise event.error
    return events


def few_frames(sizes: Sizes, video: int, image_size: int) -> npt.NDArray[np.uint8]:
    """A different video for each number; its frames repeat a few, so encoding is cheap."""
    shape = (sizes.num_distinct_frames, image_size, image_size, 3)
    distinct = np.random.default_rng(video).integers(0, 256, shape, np.uint8)
    return np.repeat(distinct, sizes.num_frames // sizes.num_distinct_frames, axis=0)


def noise_frames(sizes: Sizes, video: int, image_size: int) -> npt.NDArray[np.uint8]:
    """A different video for each number, with no two frames the same."""
    shape = (sizes.num_frames, image_size, image_size, 3)
    return np.random.default_rng(10**6 + video).integers(0, 256, shape, np.uint8)


def question_of(model: LlavaOnevision, num_tokens: int) -> str:
    """A question that gives a prompt of `num_tokens` text tokens, without the newline."""
    question = "?"
    for _ in range(num_tokens):
        prompt = model.prompt_encoder((ChatMessage("user", question),))
        if len(prompt.ids_before_video) + len(prompt.ids_after_video) >= num_tokens:
            break
        question += " the"
    return question
