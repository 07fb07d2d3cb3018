"""An engine without a model: the real one's interface, tokens that depend on all that came before.

A question may hold words that steer it:

    sleep:0.02   each step takes that long
    poison       the process dies at the third new token
    raise        the step raises at the third new token
    fail         the sequence fails at the third new token
    refuse       `add` refuses the sequence
    known        its prefix is there
    video:NAME   questions with the same name share a prefix, at the same compression
    evicted      the sequence waits for its frames at the third new token, once
"""

import os
import time
import zlib
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from dycoke_core.auto import AutoConfig, CachedChoice, Choice, Reason
from dycoke_core.config import DEFAULT_PRIORITY, CompressionConfig, Priority
from dycoke_core.engine_card import EngineCard, EngineStats
from dycoke_core.errors import EngineError, PromptTooLongError
from dycoke_core.kept_sets import KeptHistory, KeptRecorder
from dycoke_core.level_choice import NOTHING_WAITS, Outlook
from dycoke_core.model_frames import PixelLimits
from dycoke_core.sequence import (
    SAMPLER_VERSION,
    CacheReport,
    CompressionReport,
    FinishReason,
    MemoryReport,
    Sequence,
    SequenceReport,
    Stage,
    TimingReport,
    TokenEvent,
)
from tests.engine_stats import IDLE

PROMPT_TOKENS = 20
FATAL_TOKEN = 2  # new tokens before the steered mishaps


@dataclass
class FakeEngine:
    max_running_sequences: int = 4
    image_size: int = 8
    frame_limits: PixelLimits | None = None
    auto_level: int = 1
    first_token_s: float | None = None  # as it predicts
    may_choose: bool = True  # while it has work
    num_asked_to_choose: int = 0
    outlooks: list[Outlook] = field(default_factory=list)  # of each choice
    waited_s: list[float] = field(default_factory=list)  # of each choice
    sequences: dict[str, Sequence] = field(default_factory=dict)
    without_frames: dict[str, Sequence] = field(default_factory=dict)  # they wait for theirs
    evicted: set[str] = field(default_factory=set)  # those that have waited, or do
    aborted: list[str] = field(default_factory=list)
    seen: list[Sequence] = field(default_factory=list)  # all that were added
    forgotten: list[str] = field(default_factory=list)
    prefixes: set[str] = field(default_factory=set)  # of all that were added

    @property
    def card(self) -> EngineCard:
        return EngineCard(
            weights_digest="fake",
            device="cpu",
            dtype="float32",
            architecture="Fake",
            image_size=self.image_size,
            frame_limits=self.frame_limits,
            frame_rate=None,
            frame_spread="floor",
            frame_resizing="decoder",
            tokens_per_frame=4,
            frames_per_unit=1,
            num_layers=2,
            max_model_tokens=4096,
            max_words_per_token=1,
            prefill_chunk_tokens=64,
            sampler_version=SAMPLER_VERSION,
            backend="cpu",
            max_running_sequences=self.max_running_sequences,
        )

    @property
    def has_work(self) -> bool:
        return bool(self.sequences)

    @property
    def waiting_for_frames(self) -> tuple[str, ...]:
        return tuple(self.without_frames)

    def stats(self) -> EngineStats:
        num_running = min(len(self.sequences), self.max_running_sequences)
        return replace(
            IDLE,
            num_waiting=len(self.sequences) - num_running + len(self.without_frames),
            num_running=num_running,
            kv_bytes_in_use=10 * num_running,
            kv_bytes_budget=40,
        )

    def add(self, sequence: Sequence) -> str:
        if "refuse" in words(sequence):
            raise PromptTooLongError("the prompt is too long")
        size = self.image_size
        assert (
            sequence.frames is None
            or self.frame_limits is not None
            or sequence.frames.shape[1:] == (size, size, 3)
        )
        self.sequences[sequence.sequence_id] = sequence
        self.seen.append(sequence)
        self.prefixes.add(self.prefix_key(sequence))
        return self.prefix_key(sequence)

    def give_frames(self, sequence_id: str, frames: npt.NDArray[np.uint8]) -> bool:
        sequence = self.without_frames.pop(sequence_id, None)
        if sequence is None:
            return False
        sequence.frames = frames
        self.sequences[sequence_id] = sequence
        return True

    def prefix_key(self, sequence: Sequence) -> str:
        return prefix_key(sequence, sequence.compression)

    def has_prefix(self, key: str) -> bool:
        return key in self.prefixes

    def can_choose(self, config: AutoConfig, priority: Priority = DEFAULT_PRIORITY) -> bool:
        self.num_asked_to_choose += 1
        return self.may_choose

    def choose_compression(
        self,
        sequence: Sequence,
        config: AutoConfig,
        outlook: Outlook = NOTHING_WAITS,
        *,
        waited_s: float = 0.0,
        queued_s: float = 0.0,
    ) -> Choice:
        """The level that `auto_level` says."""
        assert sequence.frames is not None
        self.outlooks.append(outlook)
        self.waited_s.append(waited_s)
        if "refuse" in words(sequence):
            raise PromptTooLongError("the prompt is too long")
        level = config.ladder[self.auto_level]
        return Choice(self.auto_level, level, Reason.OBJECTIVE, waited_s + 0.5)

    def choose_cached(
        self,
        sequence: Sequence,
        config: AutoConfig,
        outlook: Outlook = NOTHING_WAITS,
        *,
        waited_s: float = 0.0,
        queued_s: float = 0.0,
    ) -> CachedChoice:
        """The weakest level whose prefix is there."""
        if "refuse" in words(sequence):
            raise PromptTooLongError("the prompt is too long")
        keys = [prefix_key(sequence, level) for level in config.ladder]
        hits = [place for place, key in enumerate(keys) if key in self.prefixes]
        if "known" in words(sequence):
            hits = [self.auto_level]
        if not hits:
            return CachedChoice(None, frozenset(keys))
        self.outlooks.append(outlook)
        choice = Choice(hits[0], config.ladder[hits[0]], Reason.CACHED, waited_s + 0.5)
        return CachedChoice(choice, frozenset(keys))

    def predict_first_token_s(self, sequence: Sequence) -> float | None:
        return self.first_token_s

    def forget_video(self, name: str) -> None:
        self.forgotten.append(name)

    def abort(self, sequence_id: str) -> bool:
        self.aborted.append(sequence_id)
        waiting = self.without_frames.pop(sequence_id, None)
        return (self.sequences.pop(sequence_id, None) or waiting) is not None

    def step(self) -> list[TokenEvent]:
        running = list(self.sequences.values())[: self.max_running_sequences]
        for sequence in running:
            if sequence.can_reload_frames and sequence.stage is not Stage.WAITING:
                sequence.frames = None
        time.sleep(max(step_time_s(sequence) for sequence in running))
        events = [event for sequence in running if (event := self._advance(sequence))]
        for event in events:
            if event.finish_reason is not None:
                del self.sequences[event.sequence_id]
        return events

    def _advance(self, sequence: Sequence) -> TokenEvent | None:
        if sequence.stage is Stage.WAITING:
            sequence.stage = Stage.ENCODING
            return None
        if sequence.stage is Stage.ENCODING:
            sequence.stage = Stage.PREFILLING
            return None
        sequence.stage = Stage.DECODING
        output = sequence.output_token_ids
        if not output:
            output.extend(sequence.forced_token_ids)
        is_fatal = len(output) - len(sequence.forced_token_ids) == FATAL_TOKEN
        if is_fatal and (mishap := self._mishap(sequence)):
            return mishap
        if is_fatal and self._is_evicted(sequence):
            return None
        index, token_id = len(output), next_token_id(question(sequence), output)
        output.append(token_id)
        is_last = len(output) == sequence.sampling.max_tokens
        return TokenEvent(
            sequence_id=sequence.sequence_id,
            index=index,
            token_ids=(token_id,),
            text=text_of(token_id),
            prompt_tokens=PROMPT_TOKENS if index == 0 else None,
            finish_reason=FinishReason.LENGTH if is_last else None,
            report=make_report(output, kept_history(sequence)) if is_last else None,
        )

    def _is_evicted(self, sequence: Sequence) -> bool:
        name = sequence.sequence_id
        if "evicted" not in words(sequence) or name in self.evicted:
            return False
        self.evicted.add(name)
        self.without_frames[name] = self.sequences.pop(name)
        return True

    def _mishap(self, sequence: Sequence) -> TokenEvent | None:
        if "poison" in words(sequence):
            os._exit(66)
        if "raise" in words(sequence):
            raise RuntimeError("the device is lost")
        if "fail" not in words(sequence):
            return None
        return TokenEvent(
            sequence_id=sequence.sequence_id,
            index=len(sequence.output_token_ids),
            token_ids=(),
            text="",
            finish_reason=FinishReason.ERROR,
            error=EngineError("the engine failed on this request"),
        )


def question(sequence: Sequence) -> str:
    return sequence.messages[-1].content


def words(sequence: Sequence) -> list[str]:
    return question(sequence).split()


def prefix_key(sequence: Sequence, compression: CompressionConfig) -> str:
    """By the question's words "video:NAME", so that tests say who shares one."""
    videos = [word for word in words(sequence) if word.startswith("video:")]
    return f"{videos[0] if videos else sequence.sequence_id} {compression}"


def step_time_s(sequence: Sequence) -> float:
    times = [float(word[6:]) for word in words(sequence) if word.startswith("sleep:")]
    return times[0] if times else 0.0


def next_token_id(text: str, output: list[int]) -> int:
    return zlib.crc32(f"{text}{output}".encode()) % 50_000


def text_of(token_id: int) -> str:
    return f"w{token_id} "


def answer(text: str, num_tokens: int) -> list[int]:
    """The token ids of an undisturbed run."""
    output: list[int] = []
    for _ in range(num_tokens):
        output.append(next_token_id(text, output))
    return output


def kept_history(sequence: Sequence) -> KeptHistory | None:
    """Of 2 x 2 tokens the first, second and fourth go in; each step keeps two of them."""
    if not sequence.wants_kept_sets or sequence.video_key is None:
        return None
    recorder = KeptRecorder(units=1, rows=2, columns=2, kept=np.array([0, 1, 3]))
    for token in range(1, len(sequence.output_token_ids)):
        recorder.add(token, np.delete(np.arange(3), token % 3))
    return recorder.history(len(sequence.output_token_ids))


def make_report(output: list[int], kept: KeptHistory | None = None) -> SequenceReport:
    return SequenceReport(
        kept=kept,
        prompt_tokens=PROMPT_TOKENS,
        completion_tokens=len(output),
        text="".join(map(text_of, output)),
        compression=CompressionReport(
            units=1,
            tokens_per_unit=4,
            rows=2,
            columns=2,
            visual_tokens_in=4,
            visual_tokens_prefill=3,
            visual_tokens_decode=2,
            pruned_layers=(1,),
            retained_ratio_prefill=0.75,
            retained_ratio_decode=0.5,
            retained_ratio_decode_all_layers=0.6,
            kept_per_frame=(3,),
            decode_steps=len(output) - 1,
            refreshes=1,
            paper_flops_full=200.0,
            paper_flops_actual=100.0,
            exact_flops_full=400.0,
            exact_flops_actual=100.0,
        ),
        timings=TimingReport(
            waiting_s=0.25,
            vision_s=0.5,
            compress_s=0.001,
            prefill_s=0.125,
            first_token_s=1.0,
            decode_s=2.0,
            per_output_token_s=0.5,
        ),
        memory=MemoryReport(
            kv_bytes=100, dp_cache_bytes=50, kv_bytes_full_tokens=300, peak_device_bytes=1000
        ),
        cache=CacheReport(has_features_hit=True, has_prefix_hit=False),
    )
