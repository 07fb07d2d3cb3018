"""The engine: `add`, `abort`, `step`. Synchronous, one thread, knows no HTTP and no Redis.

A step is `schedule → run → postprocess`. It returns one event for every token that it made. A
sequence that fails ends in an event with its error; the others go on.
"""

import contextlib
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dycoke_core.config import EngineConfig
from dycoke_core.engine.admission import Admission
from dycoke_core.engine.faults import has_broken_device, is_out_of_memory, public_error
from dycoke_core.engine.model_runner import ModelRunner
from dycoke_core.engine.report import make_report
from dycoke_core.engine.sampler import Draw, sample
from dycoke_core.engine.scheduler import PromptWork, Scheduler
from dycoke_core.engine.state import SequenceState
from dycoke_core.engine.vision_encoder import VisionEncoder
from dycoke_core.errors import EngineError, InvalidRequestError
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.loader import load_model
from dycoke_core.sequence import SAMPLER_VERSION, FinishReason, Sequence, Stage, TokenEvent

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
    sampler_version: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    num_waiting: int
    num_running: int
    kv_bytes_in_use: int  # reserved by running sequences: their prefixes and their own rows
    kv_bytes_cached: int  # prefixes that nobody holds: free on demand
    kv_bytes_budget: int
    device_memory_bytes: int  # allocated on a GPU now; 0 on a CPU


class Engine:
    """Runs sequences. All methods belong to one thread."""

    def __init__(self, model: LlavaOnevision, config: EngineConfig) -> None:
        self.model = model
        self._config = config
        self._runner = ModelRunner(model)
        self._vision = VisionEncoder(
            model,
            batch_frames=config.vision_batch_frames,
            slice_layers=config.vision_slice_layers or (2 if model.device.type == "cpu" else 1000),
        )
        self._admission = Admission(model, config)
        self._states: dict[str, SequenceState] = {}
        self._scheduler = Scheduler(
            max_running=config.max_running_sequences,
            max_prompt_tokens=config.max_prompt_tokens_per_pass,
            admit=lambda sequence: self._admission.admit(self._states[sequence.sequence_id]),
            next_work=lambda sequence: self._next_work(self._states[sequence.sequence_id]),
        )

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
            sampler_version=SAMPLER_VERSION,
        )

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def stats(self) -> EngineStats:
        device = self.model.device
        on_gpu = device.type == "cuda"
        budget, cached_bytes = self._admission.kv_budget, self._admission.idle_prefix_bytes
        return EngineStats(
            num_waiting=len(self._scheduler.waiting),
            num_running=len(self._scheduler.running),
            kv_bytes_in_use=budget.used_bytes - cached_bytes,
            kv_bytes_cached=cached_bytes,
            kv_bytes_budget=budget.max_bytes,
            device_memory_bytes=torch.cuda.memory_allocated(device) if on_gpu else 0,
        )

    def clear_caches(self) -> None:
        """Drops cached videos and prefixes that no sequence holds."""
        self._admission.clear()

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence in; `step` starts it when its turn comes.

        Raises:
            InvalidRequestError: frames, messages or compression that the model cannot take.
            PromptTooLongError: prompt and max_tokens exceed the model's positions, or the KV
            budget.
        """
        if sequence.sequence_id in self._states:
            raise InvalidRequestError("a sequence of this id is already in the engine")
        state = self._admission.prepare(sequence)
        self._states[sequence.sequence_id] = state
        self._scheduler.add(sequence)

    def abort(self, sequence_id: str) -> bool:
        """Frees all that a sequence holds; False if the engine does not have it."""
        if sequence_id not in self._states:
            return False
        self._free(self._states[sequence_id])
        return True

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Advances the scheduled sequences: one token each, and some of the others' prompts.

        Raises:
            RuntimeError: the device is lost, and the engine with it.
        """
        scheduled = self._scheduler.schedule()
        prompts = [self._states[sequence.sequence_id] for sequence in scheduled.prompts]
        decoding = [self._states[sequence.sequence_id] for sequence in scheduled.decode]
        encoding = [state for state in prompts if self._next_work(state).is_vision]
        prefilling = [state for state in prompts if state not in encoding]
        events = self._encode() if encoding else []
        if prefilling or decoding:
            events += self._run(prefilling, decoding)
        self._note_stages()
        self._note_peak()
        if not self._scheduler.has_work and self._admission.leaked_bytes:
            logger.error("%d cached bytes have leaked", self._admission.leaked_bytes)
        return events

    # --- prompts ---

    def _next_work(self, state: SequenceState) -> PromptWork:
        """What a sequence's prompt needs next: its video, its prefix, or its question."""
        chunk_tokens = self._config.prefill_chunk_tokens
        prefix = state.held_prefix
        if prefix.kv is None:
            return PromptWork(state.video_key, num_tokens=0)
        if not prefix.is_ready:
            num_left = state.num_prefix_tokens - prefix.kv.num_tokens
            return PromptWork(state.prefix_key, min(chunk_tokens, num_left))
        num_left = state.num_question_tokens - state.num_own_tokens_seen
        return PromptWork(state.sequence.sequence_id, min(chunk_tokens, num_left))

    def _encode(self) -> list[TokenEvent]:
        """One slice of the vision tower; stage I for the prefixes whose videos it completes."""
        started_at = time.perf_counter()
        waiting = [state for state in self._running() if state.held_prefix.kv is None]
        videos = dict.fromkeys(state.held_prefix.video for state in waiting)
        pending = [video for video in videos if video is not None and not video.is_ready]
        try:
            if pending:
                self._vision.encode_slice(pending)
                self._runner.synchronize()
        except Exception as error:
            if has_broken_device(error):
                raise
            logger.warning("a batch of frames failed", exc_info=error)
            culprits = self._vision.drop_failed_batch()
            doomed = [state for state in waiting if state.held_prefix.video in culprits]
            return [self._fail(state, error) for state in doomed]
        seconds = time.perf_counter() - started_at
        for state in waiting:
            state.clock.vision_s += seconds
        return [event for state in waiting if (event := self._compress(state)) is not None]

    def _compress(self, state: SequenceState) -> TokenEvent | None:
        prefix = state.held_prefix
        if prefix.kv is not None or prefix.video is None or not prefix.video.is_ready:
            return None
        started_at = time.perf_counter()
        try:
            self._runner.compress(state)
        except Exception as error:
            return self._fail(state, error)
        state.clock.compress_s += time.perf_counter() - started_at
        return None

    # --- passes ---

    def _run(
        self, prefilling: list[SequenceState], decoding: list[SequenceState]
    ) -> list[TokenEvent]:
        """One pass for all; where it fails, one for each, so that only the culprits end."""
        started_at = time.perf_counter()
        outcome, lacks_memory = None, False
        try:
            outcome = self._pass(prefilling, decoding)
        except Exception as error:
            if len(prefilling) + len(decoding) == 1:
                return [self._fail((prefilling + decoding)[0], error)]
            if has_broken_device(error):
                raise
            lacks_memory = is_out_of_memory(error)
        if outcome is None:  # not in `except`, whose traceback holds the failed pass's tensors
            if lacks_memory:
                self._release_idle_memory()
            singles = [self._run([state], []) for state in prefilling]
            singles += [self._run([], [state]) for state in decoding]
            return [event for single in singles for event in single]
        answering, logits, events = outcome
        sampling = [state for state in answering if not state.is_replaying]
        tokens = self._sample_each(sampling, logits)
        self._note_seconds(decoding, time.perf_counter() - started_at)
        for state in answering:
            event = self._append_token_guarded(state, tokens.get(state.sequence.sequence_id))
            if event is not None:
                events.append(event)
        return events

    def _pass(
        self, prefilling: list[SequenceState], decoding: list[SequenceState]
    ) -> tuple[list[SequenceState], Tensor, list[TokenEvent]]:
        """Runs one pass and advances what it ran; an exception leaves all as it was.

        Returns:
            The sequences that get a token now, logits for those of them that sample theirs, and the
            ends of those whose prefix could not be finished.
        """
        prefixes = [state for state in prefilling if not state.held_prefix.is_ready]
        questions = [state for state in prefilling if state.held_prefix.is_ready]
        for state in questions:
            if state.kv is None:
                state.kv = self._runner.begin_question(state)
        sizes = {id(state): self._next_work(state).num_tokens for state in prefilling}
        answering = [state for state in questions if state.num_question_left == sizes[id(state)]]
        answering += decoding
        logits = self._runner.run(
            [(state.held_prefix, sizes[id(state)]) for state in prefixes],
            [(state, sizes[id(state)]) for state in questions],
            decoding,
            [state in answering and not state.is_replaying for state in [*questions, *decoding]],
        )
        if not len(logits):
            self._runner.synchronize()
        return answering, logits, self._finish_prefixes(prefixes)

    def _finish_prefixes(self, states: list[SequenceState]) -> list[TokenEvent]:
        """Makes prefixes whose prefill is through ready for sharing."""
        events = []
        for state in states:
            prefix = state.held_prefix
            assert prefix.kv is not None
            if not prefix.kv.is_complete:
                continue
            try:
                self._admission.finish_prefix(state)
            except Exception as error:
                doomed = [other for other in self._running() if other.prefix is prefix]
                events += [self._fail(other, error) for other in doomed]
        return events

    def _note_seconds(self, decoding: list[SequenceState], seconds: float) -> None:
        """Every running sequence waited for the pass, those that had no part in it too."""
        for state in self._running():
            if state in decoding:
                state.clock.decode_s += seconds
            elif state.held_prefix.kv is not None:
                state.clock.prefill_s += seconds

    # --- tokens ---

    def _sample(self, states: list[SequenceState], logits: Tensor) -> list[int]:
        """logits: float32 [len(states), vocabulary]."""
        draws = [
            Draw.of_token(state.sequence.sampling, len(state.sequence.output_token_ids))
            for state in states
        ]
        sampled = sample(logits, draws)
        if not bool(sampled.is_finite.all()):
            raise EngineError("the model's logits are not finite")
        return [int(token_id) for token_id in sampled.ids.tolist()]

    def _sample_each(self, states: list[SequenceState], logits: Tensor) -> dict[str, int]:
        """Token ids by sequence id; where sampling fails, only for those that can be sampled."""
        names = [state.sequence.sequence_id for state in states]
        if not states:
            return {}
        try:
            return dict(zip(names, self._sample(states, logits), strict=True))
        except Exception as error:
            if has_broken_device(error):
                raise
        tokens = {}
        for row, state in enumerate(states):
            with contextlib.suppress(Exception):  # logged when the sequence fails for want of it
                tokens[names[row]] = self._sample([state], logits[row : row + 1])[0]
        return tokens

    def _append_token_guarded(self, state: SequenceState, sampled: int | None) -> TokenEvent | None:
        try:
            if sampled is not None or state.is_replaying:
                return self._append_token(state, sampled)
        except Exception as error:
            return self._fail(state, error)
        event = self._fail(state, EngineError("no token could be sampled"))
        self._admission.clear()  # what it shared may be what its logits suffer from
        return event

    def _append_token(self, state: SequenceState, sampled: int | None) -> TokenEvent | None:
        """Takes the sampled token, or the next forced one, which makes no event.

        A forced token that ends the answer, because the attempt before died between its last token
        and its receipt, makes an event without tokens.
        """
        sequence = state.sequence
        if state.kv is not None and not state.kv.is_decoding:
            state.kv.begin_decode()
        index = len(sequence.output_token_ids)
        token_id = sequence.forced_token_ids[index] if sampled is None else sampled
        sequence.output_token_ids.append(token_id)
        text = state.detokenizer.push(token_id)
        finish_reason = None if state.is_replaying else self._finish_reason(state, token_id)
        if finish_reason is not None:
            text += state.detokenizer.flush()
        if sampled is None and finish_reason is None:
            return None
        state.clock.note_token()
        event = TokenEvent(
            sequence_id=sequence.sequence_id,
            index=index if sampled is not None else index + 1,
            token_ids=(token_id,) if sampled is not None else (),
            text=text if sampled is not None else "",
            finish_reason=finish_reason,
        )
        if finish_reason is None:
            return event
        event = replace(event, report=make_report(self.model, state))
        self._free(state)
        return event

    def _finish_reason(self, state: SequenceState, token_id: int) -> FinishReason | None:
        if token_id in self.model.eos_token_ids or state.detokenizer.is_stopped:
            return FinishReason.STOP
        if len(state.sequence.output_token_ids) >= state.sequence.sampling.max_tokens:
            return FinishReason.LENGTH
        return None

    # --- ends ---

    def _fail(self, state: SequenceState, error: Exception) -> TokenEvent:
        """Ends one sequence, unless its failure is the device's, which ends them all."""
        if has_broken_device(error):
            raise error
        sequence = state.sequence
        logger.error("sequence failed", exc_info=error, extra={"sequence_id": sequence.sequence_id})
        self._free(state)
        if is_out_of_memory(error):
            self._release_idle_memory()
        return TokenEvent(
            sequence_id=sequence.sequence_id,
            index=len(sequence.output_token_ids),
            token_ids=(),
            text="",
            finish_reason=FinishReason.ERROR,
            error=public_error(error),
        )

    def _release_idle_memory(self) -> None:
        """So that the next one finds room where the device holds less than the budget thinks."""
        self._admission.clear()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _free(self, state: SequenceState) -> None:
        """The one place where a sequence leaves."""
        del self._states[state.sequence.sequence_id]
        self._scheduler.remove(state.sequence)
        self._admission.release(state)
        self._vision.drop_orphaned_batch()
        state.sequence.stage = Stage.FINISHED

    def _running(self) -> list[SequenceState]:
        return [self._states[sequence.sequence_id] for sequence in self._scheduler.running]

    def _note_peak(self) -> None:
        """Lets a sequence's peak be that of the steps that it ran in, on a GPU."""
        if self.model.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.model.device)
            torch.cuda.reset_peak_memory_stats(self.model.device)
            for state in self._running():
                state.peak_device_bytes = max(state.peak_device_bytes, peak)

    def _note_stages(self) -> None:
        """Shows each running sequence's stage and progress to whoever looks at it."""
        for state in self._running():
            state.note_stage()
