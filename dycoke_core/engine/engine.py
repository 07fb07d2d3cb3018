"""The engine: `add`, `abort`, `step`. Synchronous, one thread, knows no HTTP and no Redis.

A step is `schedule → run → postprocess`. It returns one event for every token that it made. A
sequence that fails ends in an event with its error; the others go on.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dycoke_core.compression.policies import make_policy
from dycoke_core.config import EngineConfig
from dycoke_core.engine.detokenizer import Detokenizer
from dycoke_core.engine.model_runner import ModelRunner
from dycoke_core.engine.report import make_report
from dycoke_core.engine.sampler import sample
from dycoke_core.engine.scheduler import Scheduler
from dycoke_core.engine.state import SequenceState
from dycoke_core.errors import (
    DycokeError,
    EngineError,
    InvalidRequestError,
    OutOfMemoryError,
    PromptTooLongError,
)
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.loader import load_model
from dycoke_core.sequence import FinishReason, Sequence, Stage, TokenEvent

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineCard:
    """What a client of the engine has to know of its model, and what its numerics depend on."""

    weights_digest: str
    device: str
    dtype: str
    image_size: int
    tokens_per_frame: int
    num_layers: int
    max_model_tokens: int
    prefill_chunk_tokens: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    num_waiting: int
    num_running: int
    kv_bytes_in_use: int  # active rows and DP caches
    kv_bytes_reserved: int
    device_memory_bytes: int  # allocated on a GPU now; 0 on a CPU


class Engine:
    """Runs sequences. All methods belong to one thread.

    Sequences are advanced one after another within a step; each has a cache of its own, allocated
    at its full size when its frames are encoded, so none runs out of memory while it decodes.
    """

    def __init__(self, model: LlavaOnevision, config: EngineConfig) -> None:
        self.model = model
        self._config = config
        self._runner = ModelRunner(model, config)
        self._scheduler = Scheduler(config.max_running_sequences)
        self._states: dict[str, SequenceState] = {}

    @classmethod
    def from_pretrained(cls, path: str | Path, config: EngineConfig | None = None) -> "Engine":
        """Loads a checkpoint directory or hub id.

        Raises:
            ModelLoadError: the checkpoint cannot be used.
        """
        config = config or EngineConfig()
        return cls(load_model(path, device=config.device, dtype=config.dtype), config)

    @property
    def card(self) -> EngineCard:
        return EngineCard(
            weights_digest=self.model.weights_digest,
            device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            image_size=self.model.image_size,
            tokens_per_frame=self.model.tokens_per_frame,
            num_layers=self.model.text_geometry.num_layers,
            max_model_tokens=self.model.max_model_tokens,
            prefill_chunk_tokens=self._config.prefill_chunk_tokens,
        )

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def stats(self) -> EngineStats:
        caches = [state.cache for state in self._states.values() if state.cache is not None]
        device = self.model.device
        return EngineStats(
            num_waiting=len(self._scheduler.waiting),
            num_running=len(self._scheduler.running),
            kv_bytes_in_use=sum(cache.active_bytes + cache.dp_cache_bytes for cache in caches),
            kv_bytes_reserved=sum(cache.reserved_bytes for cache in caches),
            device_memory_bytes=(
                torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            ),
        )

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence in; `step` starts it when its turn comes.

        Raises:
            InvalidRequestError: frames, messages or compression that the model cannot take.
            PromptTooLongError: prompt and max_tokens exceed the model's positions.
        """
        if sequence.sequence_id in self._states:
            raise InvalidRequestError("a sequence of this id is already in the engine")
        state = self._make_state(sequence)
        if not self._scheduler.has_work and self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        self._states[sequence.sequence_id] = state
        self._scheduler.add(sequence)

    def abort(self, sequence_id: str) -> bool:
        """Frees all that a sequence holds; False if the engine does not have it."""
        if sequence_id not in self._states:
            return False
        self._free(self._states[sequence_id].sequence)
        return True

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Advances the scheduled sequences: one token each, and one slice of one prompt."""
        scheduled = self._scheduler.schedule()
        events = [self._guarded(self._decode, sequence) for sequence in scheduled.decode]
        if scheduled.prefill is not None:
            events.append(self._guarded(self._work_on_prompt, scheduled.prefill))
        return [event for event in events if event is not None]

    def _make_state(self, sequence: Sequence) -> SequenceState:
        frames, size = sequence.frames, self.model.image_size
        if frames.ndim != 4 or frames.shape[0] < 1 or frames.shape[1:] != (size, size, 3):
            raise InvalidRequestError(f"frames must be [F, {size}, {size}, 3] with F of at least 1")
        sequence.compression.check_num_frames(len(frames))
        policy = make_policy(sequence.compression)
        state = SequenceState(
            sequence=sequence,
            policy=policy,
            prompt=self.model.prompt_encoder(sequence.messages),
            num_visual_tokens=policy.count_visual_tokens(len(frames), self.model.tokens_per_frame),
            detokenizer=Detokenizer(self.model.prompt_encoder.tokenizer, sequence.sampling.stop),
        )
        limit = self.model.max_model_tokens
        num_tokens = state.num_prompt_tokens + sequence.sampling.max_tokens
        if num_tokens > limit:
            raise PromptTooLongError(
                f"prompt ({state.num_prompt_tokens} tokens) and max_tokens exceed "
                f"the model's {limit} positions"
            )
        return state

    def _guarded(
        self, advance: Callable[[SequenceState], TokenEvent | None], sequence: Sequence
    ) -> TokenEvent | None:
        """Runs one sequence's share of a step; its failure is an event, not the engine's end."""
        state = self._states[sequence.sequence_id]
        try:
            event = advance(state)
            if event is not None and event.finish_reason is not None:
                event = replace(event, report=make_report(self.model, state))
                self._free(sequence)
            return event
        except Exception as error:
            logger.exception("sequence failed", extra={"job_id": sequence.sequence_id})
            self._free(sequence)
            return TokenEvent(
                sequence_id=sequence.sequence_id,
                index=len(sequence.output_token_ids),
                token_ids=(),
                text="",
                finish_reason=FinishReason.ERROR,
                error=_public_error(error),
            )

    def _work_on_prompt(self, state: SequenceState) -> TokenEvent | None:
        """One slice: a micro-batch of frames, or a chunk of the prompt."""
        sequence, clock = state.sequence, state.clock
        started_at = time.perf_counter()
        if clock.started_at is None:
            clock.started_at = started_at
        if sequence.stage is not Stage.PREFILLING:
            self._encode(state)
            return None
        logits = self._runner.prefill_chunk(state)
        clock.prefill_s += time.perf_counter() - started_at
        assert state.cache is not None
        sequence.progress = state.cache.num_tokens / state.num_prompt_tokens
        if logits is None:
            return None
        sequence.stage, sequence.progress = Stage.DECODING, 0.0
        return self._append_token(state, logits)

    def _encode(self, state: SequenceState) -> None:
        sequence, clock = state.sequence, state.clock
        sequence.stage = Stage.ENCODING
        started_at = time.perf_counter()
        is_encoded = self._runner.encode_slice(state)
        encoded_at = time.perf_counter()
        clock.vision_s += encoded_at - started_at
        sequence.progress = state.num_encoded_frames / state.num_frames
        if is_encoded:
            self._runner.compress(state)
            clock.compress_s += time.perf_counter() - encoded_at
            sequence.stage, sequence.progress = Stage.PREFILLING, 0.0

    def _decode(self, state: SequenceState) -> TokenEvent | None:
        started_at = time.perf_counter()
        output = state.sequence.output_token_ids
        needs_logits = len(output) >= state.num_forced
        logits = self._runner.decode(state, output[-1], needs_logits=needs_logits)
        event = self._append_token(state, logits)
        state.clock.decode_s += time.perf_counter() - started_at
        return event

    def _append_token(self, state: SequenceState, logits: Tensor | None) -> TokenEvent | None:
        """Samples the next token, or takes the next forced one, which makes no event.

        A forced token that ends the answer, because the attempt before died between its last token
        and its receipt, makes an event without tokens.
        """
        sequence = state.sequence
        index = len(sequence.output_token_ids)
        is_forced = index < state.num_forced
        if is_forced:
            token_id = sequence.forced_token_ids[index]
        else:
            assert logits is not None
            token_id = sample(logits, sequence.sampling, index)
        sequence.output_token_ids.append(token_id)
        text = state.detokenizer.push(token_id)
        is_replaying = index + 1 < state.num_forced
        finish_reason = None if is_replaying else self._finish_reason(state, token_id)
        if finish_reason is not None:
            text += state.detokenizer.flush()
        if is_forced and finish_reason is None:
            return None
        state.clock.note_token()
        return TokenEvent(
            sequence_id=sequence.sequence_id,
            index=len(sequence.output_token_ids) if is_forced else index,
            token_ids=() if is_forced else (token_id,),
            text="" if is_forced else text,
            finish_reason=finish_reason,
        )

    def _finish_reason(self, state: SequenceState, token_id: int) -> FinishReason | None:
        if token_id in self.model.eos_token_ids or state.detokenizer.is_stopped:
            return FinishReason.STOP
        if len(state.sequence.output_token_ids) >= state.sequence.sampling.max_tokens:
            return FinishReason.LENGTH
        return None

    def _free(self, sequence: Sequence) -> None:
        """The one place where a sequence leaves: its state holds all its tensors."""
        del self._states[sequence.sequence_id]
        self._scheduler.remove(sequence)
        sequence.stage = Stage.FINISHED


def _public_error(error: Exception) -> DycokeError:
    """What a client may read of a failure."""
    if isinstance(error, DycokeError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
        return OutOfMemoryError("the device ran out of memory for this request")
    return EngineError("the engine failed on this request")
