"""Takes sequences in: checks them, finds what they can share, and reserves all they will need.

Owns the byte budgets and the pools of shared videos and prefixes. A sequence is admitted only when
its prefix and its longest answer fit beside all that is reserved, so nothing that runs is ever out
of memory; what does not fit yet waits, and what can never fit is refused at once.
"""

import logging
import time

import numpy as np

from dycoke_core.compression.policies import Policy, make_policy
from dycoke_core.config import EngineConfig
from dycoke_core.engine.budget import host_budget_bytes, kv_budget_bytes
from dycoke_core.engine.detokenizer import Detokenizer
from dycoke_core.engine.faults import is_out_of_memory
from dycoke_core.engine.kv_cache import row_bytes
from dycoke_core.engine.prefix_cache import (
    ByteBudget,
    Prefix,
    SharedPool,
    Video,
    content_key,
    distinct_frames,
    frames_digest,
)
from dycoke_core.engine.state import SequenceState
from dycoke_core.errors import InvalidRequestError, PromptTooLongError
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import Sequence

logger = logging.getLogger(__name__)


class Admission:
    def __init__(self, model: LlavaOnevision, config: EngineConfig) -> None:
        self._model = model
        self._config = config
        self._row_bytes = row_bytes(model.text_geometry, model.dtype)
        self.kv_budget = ByteBudget(kv_budget_bytes(model, config))
        self._videos: SharedPool[Video] = SharedPool(ByteBudget(config.feature_cache_bytes))
        self.host_budget = ByteBudget(host_budget_bytes(config))
        self._prefixes: SharedPool[Prefix] = SharedPool(self.kv_budget, self.host_budget)

    @property
    def idle_prefix_bytes(self) -> int:
        return self._prefixes.idle_bytes

    def prepare(self, sequence: Sequence) -> SequenceState:
        """Resolves a sequence against the model and refuses what can never run.

        Raises:
            InvalidRequestError: frames, messages or compression that the model cannot take.
            PromptTooLongError: more tokens than the model has positions, or the budget has room.
        """
        frames, size = sequence.frames, self._model.image_size
        if frames.ndim != 4 or frames.shape[0] < 1 or frames.shape[1:] != (size, size, 3):
            raise InvalidRequestError(f"frames must be [F, {size}, {size}, 3] with F of at least 1")
        if frames.dtype != np.uint8:
            raise InvalidRequestError("frames must be uint8")
        sequence.compression.check_num_frames(len(frames))
        policy = make_policy(sequence.compression)
        prompt = self._model.prompt_encoder(sequence.messages)
        video_key = sequence.video_key or frames_digest(frames)
        distinct, sources = distinct_frames(frames)
        state = SequenceState(
            sequence=sequence,
            policy=policy,
            prompt=prompt,
            num_visual_tokens=policy.count_visual_tokens(len(frames), self._model.tokens_per_frame),
            video_key=content_key(video_key, len(frames)),
            prefix_key=self._prefix_key(video_key, len(frames), policy, prompt.ids_before_video),
            distinct_frames=distinct,
            frame_sources=sources,
            detokenizer=Detokenizer(self._model.prompt_encoder.tokenizer, sequence.sampling.stop),
        )
        self._check_size(state)
        return state

    def admit(self, state: SequenceState) -> bool:
        """Reserves a sequence's own rows and holds its prefix; False: there is no room now.

        Nothing is evicted for a sequence that is not admitted.
        """
        own_bytes = self._own_bytes(state)
        prefix = self._prefixes.hold(state.prefix_key)
        state.has_prefix_hit = prefix is not None
        if prefix is None:
            prefix = self._add_prefix(state, own_bytes)
        elif not self._prefixes.can_make_room(own_bytes):
            self._prefixes.release(prefix)
            prefix = None
        if prefix is None:
            return False
        self._prefixes.make_room(own_bytes)
        self.kv_budget.used_bytes += own_bytes
        state.reserved_bytes = own_bytes
        state.prefix = prefix
        state.has_video_hit = state.has_video_hit or state.has_prefix_hit
        state.clock.started_at = time.perf_counter()
        return True

    def finish_prefix(self, state: SequenceState) -> None:
        """Lets go of what only the prefill of a prefix needed.

        With the DP cache in host memory that is most of its device bytes: a prefix is reserved
        whole while it is prefilled, which few are at a time, and then keeps its unpruned layers.
        Where host memory is full it stays on the device.
        """
        prefix = state.held_prefix
        assert prefix.kv is not None and prefix.video is not None
        first_layer = self._first_host_layer(state)
        num_layers = self._model.text_geometry.num_layers
        host_bytes = prefix.kv.num_tokens * (num_layers - first_layer) * self._row_bytes
        if host_bytes and self._prefixes.make_host_room(host_bytes):
            self._move_to_host(prefix, first_layer, host_bytes)
        self._videos.release(prefix.video)
        prefix.video = prefix.embeds = None

    def _move_to_host(self, prefix: Prefix, first_layer: int, num_bytes: int) -> None:
        assert prefix.kv is not None
        try:
            prefix.kv.move_to_host(first_layer)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("the host has no memory to pin for a prefix, which stays on the device")
        else:
            self._prefixes.move_to_host(prefix, num_bytes)

    def release(self, state: SequenceState) -> None:
        """Gives back all that a sequence reserved and holds."""
        if state.prefix is not None:
            self._prefixes.release(state.prefix)
            if state.prefix.holders == 0 and state.prefix.video is not None:
                self._videos.release(state.prefix.video)
        self.kv_budget.used_bytes -= state.reserved_bytes
        state.prefix = state.kv = None
        state.reserved_bytes = 0

    @property
    def leaked_bytes(self) -> int:
        """With no sequence in the engine, only what nobody holds may be left."""
        kv_bytes = self.kv_budget.used_bytes - self._prefixes.idle_bytes
        return kv_bytes + self._videos.budget.used_bytes - self._videos.idle_bytes

    def clear(self) -> None:
        self._prefixes.clear()
        self._videos.clear()

    def _add_prefix(self, state: SequenceState, own_bytes: int) -> Prefix | None:
        """A new prefix, held, and its video; None if there is no room beside `own_bytes`."""
        prefix_bytes = self._prefix_bytes(state)
        if not self._prefixes.can_make_room(prefix_bytes + own_bytes):
            return None
        video = self._videos.hold(state.video_key)
        state.has_video_hit = video is not None
        if video is None:
            video = self._add_video(state)
        if video is None:
            return None
        self._prefixes.make_room(prefix_bytes + own_bytes)
        prefix = Prefix(state.prefix_key, video, prefix_bytes)
        self._prefixes.add(prefix)
        return prefix

    def _add_video(self, state: SequenceState) -> Video | None:
        num_bytes = len(state.distinct_frames) * self._frame_feature_bytes
        if not self._videos.can_make_room(num_bytes):
            return None
        self._videos.make_room(num_bytes)
        video = Video(
            state.video_key,
            state.sequence.frames,
            state.distinct_frames,
            state.frame_sources,
            num_bytes,
        )
        self._videos.add(video)
        return video

    def _check_size(self, state: SequenceState) -> None:
        max_tokens = state.sequence.sampling.max_tokens
        if state.num_forced > max_tokens:
            raise InvalidRequestError("more tokens are forced than max_tokens allows")
        limit = self._model.max_model_tokens
        if state.num_prompt_tokens + max_tokens > limit:
            raise PromptTooLongError(
                f"prompt ({state.num_prompt_tokens} tokens) and max_tokens exceed "
                f"the model's {limit} positions"
            )
        kv_bytes = self._prefix_bytes(state) + self._own_bytes(state)
        feature_bytes = state.num_frames * self._frame_feature_bytes
        if kv_bytes > self.kv_budget.max_bytes or feature_bytes > self._videos.budget.max_bytes:
            raise PromptTooLongError(
                f"prompt ({state.num_prompt_tokens} tokens) and max_tokens exceed "
                "the memory that this server has for one request"
            )

    @property
    def _frame_feature_bytes(self) -> int:
        width = self._model.text_geometry.hidden_size
        return self._model.tokens_per_frame * width * self._model.dtype.itemsize

    def _prefix_key(
        self, video_key: str, num_frames: int, policy: Policy, ids_before_video: tuple[int, ...]
    ) -> str:
        """Everything that changes a prefix's keys and values, and in which memory they lie."""
        num_visual = policy.count_visual_tokens(num_frames, self._model.tokens_per_frame)
        num_layers = self._model.text_geometry.num_layers
        first_pruned = policy.first_pruned_layer(num_visual, num_layers)
        placement = max(first_pruned, 1) if self._config.dp_cache == "host" else None
        return content_key(video_key, num_frames, policy.stage_one_key, ids_before_video, placement)

    def _first_pruned_layer(self, state: SequenceState) -> int:
        num_layers = self._model.text_geometry.num_layers
        return state.policy.first_pruned_layer(state.num_visual_tokens, num_layers)

    def _first_host_layer(self, state: SequenceState) -> int:
        """From here on a finished prefix lies in host memory. The scoring layer never does."""
        if self._config.dp_cache == "device":
            return self._model.text_geometry.num_layers
        return max(self._first_pruned_layer(state), 1)

    def _prefix_bytes(self, state: SequenceState) -> int:
        return state.num_prefix_tokens * self._model.text_geometry.num_layers * self._row_bytes

    def _own_bytes(self, state: SequenceState) -> int:
        """Of its slabs: question and answer in every layer, kept and text rows in pruned ones."""
        num_layers, num_visual = self._model.text_geometry.num_layers, state.num_visual_tokens
        num_pruned = num_layers - self._first_pruned_layer(state)
        num_kept = state.policy.count_decode_tokens(num_visual, num_layers)
        num_front = num_kept + state.num_prefix_tokens - num_visual
        rows = num_layers * state.max_own_tokens + num_pruned * num_front
        return rows * self._row_bytes
