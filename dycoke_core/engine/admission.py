"""Admits sequences: checks them, finds what they can share, and reserves all that they will need.

Owns the byte budgets and the pools of shared videos and prefixes. A sequence is admitted only if
its prefix and its longest answer fit in addition to everything that is reserved, so a running
sequence never runs out of memory. A sequence that does not fit yet waits; one that can never fit is
refused at once.
"""

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dycoke_core.compression.policies import Policy, make_policy
from dycoke_core.config import Batching, CompressionConfig, EngineConfig
from dycoke_core.engine.backend import Backend, PrefixLayout, SeatLayout
from dycoke_core.engine.budget import max_frame_pixels
from dycoke_core.engine.detokenizer import Detokenizer
from dycoke_core.engine.faults import is_out_of_memory
from dycoke_core.engine.kept_recording import KeptRecording
from dycoke_core.engine.prefix_cache import (
    ByteBudget,
    Prefix,
    SharedPool,
    Video,
    content_key,
)
from dycoke_core.engine.room import Room
from dycoke_core.engine.state import SequenceState
from dycoke_core.errors import InvalidRequestError, PromptTooLongError
from dycoke_core.frame_content import content_of, frames_digest
from dycoke_core.model.adapter import Clip, PromptLayout, VideoLanguageModel
from dycoke_core.sequence import Sequence

logger = logging.getLogger(__name__)

_NO_COMPRESSION = CompressionConfig(policy="full")


@dataclass(frozen=True, slots=True)
class ResolvedSequence:
    """The part of a sequence's state that does not depend on its compression."""

    sequence: Sequence
    prompt: PromptLayout
    video_key: str
    distinct_units: tuple[int, ...]
    unit_sources: tuple[int, ...]


class Admission:
    def __init__(
        self, model: VideoLanguageModel, backend: Backend, config: EngineConfig, batching: Batching
    ) -> None:
        self._model = model
        self._backend = backend
        self._full_layers = tuple(
            layer for layer, spec in enumerate(model.layers) if spec.window is None
        )
        self._has_host_tier = config.dp_cache == "host"
        self._max_frame_pixels = max_frame_pixels(model, config)
        self._max_chunk_tokens = batching.prefill_chunk_tokens
        self.kv_budget = ByteBudget(backend.kv_budget_bytes)
        self.host_budget = ByteBudget(backend.host_budget_bytes)
        self._videos: SharedPool[Video] = SharedPool(ByteBudget(config.feature_cache_bytes))
        self._prefixes: SharedPool[Prefix] = SharedPool(
            self.kv_budget,
            self.host_budget,
            on_drop=lambda prefix: backend.close_prefix(prefix.number),
        )
        self._room = Room(backend, self._prefixes, self._videos, self._video_bytes)

    @property
    def num_prefixes(self) -> int:
        return len(self._prefixes)

    @property
    def idle_prefix_bytes(self) -> int:
        return self._prefixes.idle_bytes

    def prepare(self, sequence: Sequence) -> SequenceState:
        """Resolves a sequence against the model and refuses what can never run.

        Raises:
            InvalidRequestError: frames, messages or compression that the model cannot take.
            PromptTooLongError: more tokens than the model has positions, or the budget has room.
        """
        return self.compressed(self.resolve(sequence), sequence.compression)

    def resolve(self, sequence: Sequence) -> ResolvedSequence:
        """Resolves what does not depend on the compression.

        Raises:
            InvalidRequestError: frames or messages that the model cannot take.
        """
        frames, clip, video_key = sequence.frames, None, ""
        distinct: tuple[int, ...] = ()
        sources: tuple[int, ...] = ()
        if frames is None and sequence.can_reload_frames:
            raise InvalidRequestError("the frames are missing")  # an earlier run let them go
        if frames is not None:
            clip = self._model.clip(frames.shape, sequence.timing)
            self._check_frame_size(clip)
            if frames.dtype != np.uint8:
                raise InvalidRequestError("frames must be uint8")
            content = content_of(sequence, self._model.frames_per_unit)
            video_key, distinct = content.key, content.distinct_units
            sources = content.unit_sources
        prompt = self._model.lay_out(sequence.messages, clip, sequence.video_turn)
        return ResolvedSequence(sequence, prompt, video_key, distinct, sources)

    def compressed(
        self, resolved: ResolvedSequence, compression: CompressionConfig
    ) -> SequenceState:
        """Raises as `prepare`."""
        sequence, prompt = resolved.sequence, resolved.prompt
        frames, video_key = sequence.frames, resolved.video_key
        if frames is None:
            compression = _NO_COMPRESSION
        else:
            compression.check_num_frames(len(resolved.unit_sources))
        policy = make_policy(compression)
        layout = self._lay_out(sequence, policy, prompt)
        state = SequenceState(
            sequence=sequence,
            policy=policy,
            prompt=prompt,
            layout=layout,
            video_key=_video_key(video_key, frames),
            prefix_key=content_key(
                video_key,
                prompt.clip,  # its size and times decide positions
                policy.stage_one_key,
                prompt.prefix,
                layout.prefix.first_host_layer,
            ),
            distinct_units=resolved.distinct_units,
            unit_sources=resolved.unit_sources,
            detokenizer=self._detokenizer(sequence),
            max_chunk_tokens=self._max_chunk_tokens,
            forced_token_ids=sequence.forced_token_ids,
            kept_recording=self._kept_recording(sequence, prompt),
        )
        self._check_size(state)
        return state

    def has_prefix(self, key: str) -> bool:
        """Whether a prefix is cached or being made."""
        return key in self._prefixes

    def has_video(self, key: str) -> bool:
        """Whether a video's features are cached or being made."""
        return key in self._videos

    def lacks_frames(self, state: SequenceState) -> bool:
        """Whether it has dropped its frames and has to encode its video again."""
        has_frames = not state.has_video or state.sequence.frames is not None
        return not (
            has_frames or self.has_prefix(state.prefix_key) or self.has_video(state.video_key)
        )

    def take_frames(self, state: SequenceState, frames: npt.NDArray[np.uint8]) -> None:
        """Gives a sequence its frames again.

        Raises:
            InvalidRequestError: these are not the frames that it had.
        """
        sequence = state.sequence
        key = _video_key(sequence.video_key or frames_digest(frames), frames)
        if frames.dtype != np.uint8 or key != state.video_key:
            raise InvalidRequestError("these are not the frames that the sequence had")
        sequence.frames = frames

    def admit(self, state: SequenceState) -> bool:
        """Reserves a seat and holds its prefix; False: there is no room now.

        Nothing is evicted for a sequence whose bytes are not free or idle. From here on its video
        holds its frames, for those who share it, until it is encoded.
        """
        seat_bytes = self._backend.seat_bytes(state.layout)
        prefix = self._prefixes.hold(state.prefix_key)
        if not state.num_preemptions:
            state.has_prefix_hit = prefix is not None
        if prefix is None:
            prefix = self._add_prefix(state, seat_bytes)
        elif not self._prefixes.can_make_room(seat_bytes):
            self._prefixes.release(prefix)
            prefix = None
        if prefix is None:
            return False
        self._prefixes.make_room(seat_bytes)
        seat = self._opened(lambda: self._backend.open_seat(prefix.number, state.layout))
        if seat is None:
            is_alone = self.kv_budget.used_bytes == prefix.num_bytes  # nothing else is left
            self._let_go(prefix)
            if is_alone:
                self._prefixes.evict_one()  # its own prefix, which is in the way
            return False
        self.kv_budget.used_bytes += seat_bytes
        state.reserved_bytes = seat_bytes
        state.prefix, state.seat = prefix, seat
        if state.sequence.can_reload_frames:
            state.sequence.frames = None
        state.has_video_hit = state.has_video_hit or state.has_prefix_hit
        state.clock.note_start()
        return True

    def fits(self, states: Collection[SequenceState]) -> bool:
        """Whether `admit` would find the bytes for all of them if nothing else ran. They may still
        not be in pieces that fit."""
        return self._room.fits(tuple(states))

    @contextmanager
    def keeping(self, state: SequenceState) -> Iterator[None]:
        """Holds what a sequence will share, ready or not, while others make room for it."""
        prefix = self._prefixes.hold(state.prefix_key)
        video = self._videos.hold(state.video_key) if prefix is None else None
        try:
            yield
        finally:
            if prefix is not None:
                self._let_go(prefix)
            if video is not None:
                self._videos.release(video)

    def preempt(self, state: SequenceState) -> SequenceState:
        """Gives back all that a sequence reserved and holds; returns what waits in its place."""
        state.is_finished = True  # what is still being made for it is dropped
        sequence, prompt, video = state.sequence, state.prompt, state.held_prefix.video
        if sequence.can_reload_frames and video is not None:
            sequence.frames = video.frames  # None once it is encoded
        self.release(state)
        recording = self._kept_recording(sequence, prompt)
        return state.resumed(self._detokenizer(sequence), recording)

    def adopt_prefix(self, sequence: Sequence, number: int) -> None:
        """Takes a finished prefix of the backend's as that of a sequence's video: benchmarks start
        their decode steps so, without reading a video for each."""
        state = self.prepare(sequence)
        layout = state.layout.prefix
        prefix = Prefix(
            state.prefix_key,
            number,
            layout.num_tokens,
            None,
            self._backend.prefix_bytes(layout),
            is_embedded=True,
            num_run=layout.num_tokens,
            kept_per_unit=(0,) * state.prompt.num_units,
        )
        self._prefixes.add(prefix)
        host_bytes = self._backend.host_bytes(layout)
        if host_bytes and self._prefixes.make_host_room(host_bytes):
            self._prefixes.move_to_host(prefix, self._backend.moved_bytes(layout), host_bytes)
        self._prefixes.release(prefix)

    def finish_prefix(self, state: SequenceState) -> None:
        """Lets go of what only the prefill of a prefix needed.

        With the DP cache in host memory that is most of its device bytes: a prefix is reserved
        whole while it is prefilled, which few are at a time, and then keeps its unpruned layers.
        Where host memory is full it stays on the device.
        """
        prefix, layout = state.held_prefix, state.layout.prefix
        host_bytes = self._backend.host_bytes(layout)
        to_host = bool(host_bytes) and self._prefixes.make_host_room(host_bytes)
        try:
            self._backend.finish_prefix(prefix.number, to_host=to_host)
        except Exception as error:
            if not (to_host and is_out_of_memory(error)):
                raise
            logger.warning("a prefix stays on the device: it could not be moved (%s)", error)
            self._backend.finish_prefix(prefix.number, to_host=False)
        else:
            if to_host:
                self._prefixes.move_to_host(prefix, self._backend.moved_bytes(layout), host_bytes)
        if prefix.video is not None:
            self._videos.release(prefix.video)
            prefix.video = None

    def release(self, state: SequenceState) -> None:
        """Gives back all that a sequence reserved and holds."""
        if state.seat is not None:
            self._backend.close_seat(state.seat)
        if state.prefix is not None:
            self._let_go(state.prefix)
        self.kv_budget.used_bytes -= state.reserved_bytes
        state.prefix = state.seat = None
        state.reserved_bytes = 0

    def _let_go(self, prefix: Prefix) -> None:
        self._prefixes.release(prefix)
        if prefix.holders == 0 and prefix.video is not None:
            self._videos.release(prefix.video)

    def _opened(self, reserve: Callable[[], int | None]) -> int | None:
        """Evicts idle prefixes until the backend's free bytes are in pieces that fit."""
        number = reserve()
        while number is None and self._prefixes.evict_one():
            number = reserve()
        return number

    @property
    def leaked_bytes(self) -> int:
        """With no sequence in the engine, only items without a holder may be left."""
        kv_bytes = self.kv_budget.used_bytes - self._prefixes.idle_bytes
        return kv_bytes + self._videos.budget.used_bytes - self._videos.idle_bytes

    def clear_prefixes(self) -> None:
        """Drops prefixes without a holder, and keeps their videos' features."""
        self._prefixes.clear()

    def forget_video(self, name: str) -> None:
        self._prefixes.forget(name)
        self._videos.forget(name)

    def clear(self) -> None:
        self._prefixes.clear()
        self._videos.clear()

    def _add_prefix(self, state: SequenceState, seat_bytes: int) -> Prefix | None:
        """A new prefix, held, and its video; None if there is no room beside `seat_bytes`."""
        layout = state.layout.prefix
        prefix_bytes = self._backend.prefix_bytes(layout)
        if not self._prefixes.can_make_room(prefix_bytes + seat_bytes):
            return None
        video = None
        if state.has_video:
            video = self._videos.hold(state.video_key)
            if not state.num_preemptions:
                state.has_video_hit = video is not None
            if video is None:
                video = self._add_video(state)
            if video is None:
                return None
        self._prefixes.make_room(prefix_bytes + seat_bytes)
        number = self._opened(lambda: self._backend.open_prefix(layout))
        if number is None:
            if video is not None:
                self._videos.release(video)
            return None
        prefix = Prefix(
            state.prefix_key,
            number,
            layout.num_tokens,
            video,
            prefix_bytes,
            video_name=state.sequence.video_name,
        )
        self._prefixes.add(prefix)
        return prefix

    def _video_bytes(self, state: SequenceState) -> int:
        return len(state.distinct_units) * self._unit_feature_bytes(state)

    def _add_video(self, state: SequenceState) -> Video | None:
        num_bytes = self._video_bytes(state)
        if state.sequence.frames is None or not self._videos.can_make_room(num_bytes):
            return None
        self._videos.make_room(num_bytes)
        video = Video(
            state.video_key,
            state.sequence.frames,
            state.distinct_units,
            state.unit_sources,
            num_bytes,
            video_name=state.sequence.video_name,
        )
        self._videos.add(video)
        return video

    def _detokenizer(self, sequence: Sequence) -> Detokenizer:
        return Detokenizer(self._model.tokenizer, sequence.sampling.stop)

    def _kept_recording(self, sequence: Sequence, prompt: PromptLayout) -> KeptRecording | None:
        clip = prompt.clip
        if clip is None or not sequence.wants_kept_sets:
            return None
        return KeptRecording(prompt.num_units, self._model.token_grid(clip.height, clip.width))

    def _check_frame_size(self, clip: Clip) -> None:
        """Refuses frames for which no memory is reserved."""
        if clip.height * clip.width > self._max_frame_pixels:
            raise InvalidRequestError(
                f"frames may have at most {self._max_frame_pixels} pixels, and these have "
                f"{clip.height} x {clip.width}"
            )

    def _check_size(self, state: SequenceState) -> None:
        max_tokens = state.sequence.sampling.max_tokens
        if state.num_forced > max_tokens:
            raise InvalidRequestError("more tokens are forced than max_tokens allows")
        limit = self._model.max_model_tokens
        first_own = max(state.num_prefix_tokens, state.layout.prefix.next_position)
        if first_own + state.num_question_tokens + max_tokens > limit:
            raise PromptTooLongError(
                f"prompt ({state.num_prompt_tokens} tokens) and max_tokens ({max_tokens}) exceed "
                f"the model's {limit} positions: ask for less of either"
            )
        kv_bytes = self._backend.prefix_bytes(state.layout.prefix)
        kv_bytes += self._backend.seat_bytes(state.layout)
        feature_bytes = state.prompt.num_units * self._unit_feature_bytes(state)
        if kv_bytes > self.kv_budget.max_bytes or feature_bytes > self._videos.budget.max_bytes:
            raise PromptTooLongError(
                f"prompt ({state.num_prompt_tokens} tokens) and max_tokens ({max_tokens}) exceed "
                "the memory that this server has for one request: ask for less of either"
            )

    def _unit_feature_bytes(self, state: SequenceState) -> int:
        num_values = state.prompt.tokens_per_unit * self._model.feature_size
        return num_values * self._model.dtype.itemsize

    def _lay_out(self, sequence: Sequence, policy: Policy, prompt: PromptLayout) -> SeatLayout:
        num_layers = self._model.text_geometry.num_layers
        num_visual = policy.count_visual_tokens(prompt.num_units, prompt.tokens_per_unit)
        stage_two = policy.stage_two(num_visual, num_layers)
        if stage_two is not None:
            stage_two = stage_two.in_layers(self._full_layers, num_layers)
        first_host_layer = num_layers
        has_windows = len(self._full_layers) < num_layers  # which read prefixes in every layer
        if self._has_host_tier and stage_two is not None and not has_windows:
            first_host_layer = max(stage_two.first_layer, 1)  # the scoring layer is never there
        return SeatLayout(
            prefix=PrefixLayout(
                num_tokens=prompt.num_prefix_text + num_visual,
                num_visual=num_visual,
                next_position=self._model.next_position(prompt, num_visual),
                first_host_layer=first_host_layer,
            ),
            max_own_tokens=len(prompt.question_ids) + sequence.sampling.max_tokens,
            stage_two=stage_two,
        )


def _video_key(name: str, frames: npt.NDArray[np.uint8] | None) -> str:
    return content_key(name, None if frames is None else frames.shape)
