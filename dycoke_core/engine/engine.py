"""The engine: `add`, `abort`, `step`. Synchronous, one thread, knows no HTTP and no Redis.

A step is `schedule → run → postprocess`. It returns one event for every token that became known.
A sequence that fails ends in an event with its error; the others continue.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dycoke_core.auto import AutoConfig, CachedChoice, Choice
from dycoke_core.config import PRIORITIES, EngineConfig, Priority
from dycoke_core.engine.admission import Admission
from dycoke_core.engine.answers import Answers, Ended
from dycoke_core.engine.auto_compression import AutoCompression
from dycoke_core.engine.backends import backend_name, make_backend
from dycoke_core.engine.executor import Executor, Observer
from dycoke_core.engine.faults import is_out_of_memory
from dycoke_core.engine.first_token import FirstTokenPredictor
from dycoke_core.engine.scheduler import Schedule, Scheduler
from dycoke_core.engine.seeded_rates import seeded_rates
from dycoke_core.engine.state import SequenceState
from dycoke_core.engine.vision_encoder import VisionEncoder
from dycoke_core.engine_card import EngineCard, EngineStats
from dycoke_core.errors import EngineError, InvalidRequestError
from dycoke_core.level_choice import NOTHING_WAITS, Outlook
from dycoke_core.model.adapter import VideoLanguageModel
from dycoke_core.model.loader import load_model
from dycoke_core.preprocess import max_words_per_token
from dycoke_core.sequence import SAMPLER_VERSION, Sequence, Stage, TokenEvent

logger = logging.getLogger(__name__)


class Engine:
    """Runs sequences. All methods belong to one thread.

    Args:
        observer: sees every pass after its launch, for tests and the laboratory.
    """

    def __init__(
        self, model: VideoLanguageModel, config: EngineConfig, *, observer: Observer | None = None
    ) -> None:
        self.model = model
        self.backend_name = backend_name(config, model.device)
        self.batching = config.batching(self.backend_name)
        self.backend = make_backend(self.backend_name, model, config, self.batching)
        self.admission = Admission(model, self.backend, config, self.batching)
        self._states: dict[str, SequenceState] = {}
        self._num_preemptions: Counter[Priority] = Counter()
        self._vision = VisionEncoder(
            model,
            self.backend,
            batch_frames=self.batching.vision_batch_frames,
            slice_layers=config.vision_slice_layers or self.backend.vision_slice_layers,
        )
        self.scheduler: Scheduler[SequenceState] = Scheduler(
            max_running=self.batching.max_running_sequences,
            max_prompt_tokens=self.batching.max_prompt_tokens_per_pass,
            admission=self.admission,
        )
        rates = seeded_rates(
            model, self.backend, max_prompt_tokens=self.batching.max_prompt_tokens_per_pass
        )
        self._predictor = FirstTokenPredictor(model, self.admission, self.scheduler, rates)
        self._auto = AutoCompression(self.admission, self._predictor)
        self._executor = Executor(
            model, self.backend, self._vision, self.admission, rates, observer
        )
        self._answers = Answers(model, self.backend)

    @classmethod
    def from_pretrained(cls, path: str | Path, config: EngineConfig | None = None) -> "Engine":
        """Loads a checkpoint directory or hub id.

        Raises:
            ModelLoadError: the checkpoint cannot be used, or not by this backend.
        """
        config = config or EngineConfig()
        model = load_model(path, device=config.device, dtype=config.dtype, revision=config.revision)
        return cls(model, config)

    @property
    def card(self) -> EngineCard:
        image_size = self.model.image_size
        return EngineCard(
            weights_digest=self.model.weights_digest,
            device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            architecture=self.model.architecture,
            image_size=image_size,
            frame_limits=self.model.frame_limits,
            frame_spread=self.model.frame_spread,
            frame_rate=self.model.frame_rate,
            frame_resizing=self.model.frame_resizing,
            tokens_per_frame=self.model.tokens_per_unit(image_size, image_size),
            frames_per_unit=self.model.frames_per_unit,
            num_layers=self.model.text_geometry.num_layers,
            max_model_tokens=self.model.max_model_tokens,
            max_words_per_token=max_words_per_token(self.model.tokenizer),
            prefill_chunk_tokens=self.batching.prefill_chunk_tokens,
            sampler_version=SAMPLER_VERSION,
            backend=self.backend_name,
            max_running_sequences=self.batching.max_running_sequences,
        )

    @property
    def states(self) -> Mapping[str, SequenceState]:
        """The engine's state of each sequence that it holds."""
        return self._states

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do. Sequences that wait for their frames do not count."""
        return self.scheduler.has_work or self._executor.has_outstanding

    def stats(self) -> EngineStats:
        budget, cached_bytes = self.admission.kv_budget, self.admission.idle_prefix_bytes
        return EngineStats(
            num_waiting=len(self.scheduler.waiting) + len(self.scheduler.waiting_for_frames),
            num_running=len(self.scheduler.running),
            kv_bytes_in_use=budget.used_bytes - cached_bytes,
            kv_bytes_cached=cached_bytes,
            kv_bytes_budget=budget.max_bytes,
            device_memory_bytes=self.backend.memory_in_use(),
            num_preemptions=dict(self._num_preemptions),
        )

    def clear_caches(self) -> None:
        """Drops cached videos and prefixes that no sequence holds."""
        self.admission.clear()

    def forget_video(self, name: str) -> None:
        """Drops what is cached of a video; what sequences hold is dropped with the last of them."""
        self.admission.forget_video(name)

    def add(self, sequence: Sequence) -> str:
        """Takes a sequence in; `step` starts it when its turn comes.

        Returns:
            The key of its prefix, which is cached from now on, or on its way.

        Raises:
            InvalidRequestError: frames, messages or compression that the model cannot take.
            PromptTooLongError: prompt and max_tokens exceed the model's positions, or the KV
            budget.
        """
        if sequence.sequence_id in self._states:
            raise InvalidRequestError("a sequence of this id is already in the engine")
        state = self.admission.prepare(sequence)
        self._auto.note_added(state)
        self._states[sequence.sequence_id] = state
        self.scheduler.add(state)
        return state.prefix_key

    @property
    def waiting_for_frames(self) -> tuple[str, ...]:
        """Sequences that stand still until `give_frames`, or `abort`: they were preempted, what was
        made of their videos is gone, and so are their frames (`Sequence.can_reload_frames`).
        """
        waiting = self.scheduler.waiting_for_frames
        return tuple(state.sequence.sequence_id for state in waiting)

    def give_frames(self, sequence_id: str, frames: npt.NDArray[np.uint8]) -> bool:
        """Supplies frames that a sequence waits for; False if it does not, or is gone.

        Raises:
            InvalidRequestError: they are not those that it had. It keeps waiting.
        """
        if sequence_id not in self.waiting_for_frames:
            return False
        state = self._states[sequence_id]
        self.admission.take_frames(state, frames)
        self.scheduler.resume(state)
        return True

    def predict_first_token_s(self, sequence: Sequence) -> float | None:
        """Seconds to the first token if the sequence were added now, assuming that lower priorities
        give way. None until enough has run to measure.

        Raises:
            InvalidRequestError, PromptTooLongError: as `add`.
        """
        return self._predictor.earliest_s(self.admission.prepare(sequence))

    def has_prefix(self, key: str) -> bool:
        """Whether a prefix is cached or on its way."""
        return self._predictor.has_prefix(key)

    def prefix_key(self, sequence: Sequence) -> str:
        """The key of a sequence's prefix, which others about the same video may share.

        Raises:
            InvalidRequestError, PromptTooLongError: as `add`.
        """
        return self.admission.prepare(sequence).prefix_key

    def can_choose(self, config: AutoConfig, priority: Priority = PRIORITIES[-1]) -> bool:
        """Whether the engine has so little queued for a sequence of this priority that its
        compression should be chosen now. Always true when it has no work.
        """
        return self._auto.can_choose(config, priority)

    def choose_compression(
        self,
        sequence: Sequence,
        config: AutoConfig,
        outlook: Outlook = NOTHING_WAITS,
        *,
        waited_s: float = 0.0,
        queued_s: float = 0.0,
    ) -> Choice:
        """Chooses by the rule of `dycoke_core.level_choice`.

        The choice holds for a sequence that is added right away. `Sequence.compression` is not
        looked at.

        Args:
            outlook: what waits after the sequence, and how often requests arrive.
            waited_s: since the request was accepted.
            queued_s: since it was queued, which may be later.

        Raises:
            InvalidRequestError: no video to compress, or frames and messages that the model cannot
                take.
            PromptTooLongError: the prompt does not fit at any level.
        """
        _check_has_video(sequence)
        return self._auto.choose(sequence, config, outlook, waited_s=waited_s, queued_s=queued_s)

    def choose_cached(
        self,
        sequence: Sequence,
        config: AutoConfig,
        outlook: Outlook = NOTHING_WAITS,
        *,
        waited_s: float = 0.0,
        queued_s: float = 0.0,
    ) -> CachedChoice:
        """Chooses as `choose_compression`, but only a level whose prefix is cached or on its way.

        Only `add` creates prefixes: until it has returned one of the keys, there is no need to
        ask again.

        Raises:
            InvalidRequestError, PromptTooLongError: as `choose_compression`.
        """
        _check_has_video(sequence)
        return self._auto.choose_cached(
            sequence, config, outlook, waited_s=waited_s, queued_s=queued_s
        )

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
        schedule = self.scheduler.schedule()
        self._take_preempted(schedule)
        outcome = self._executor.run(schedule)
        events, ended = self._answers.postprocess(outcome)
        self._free_ended(ended)
        for state in self.scheduler.running:
            state.note_stage()
        if not self.has_work:
            self._check_idle()
        return events

    def _take_preempted(self, schedule: Schedule[SequenceState]) -> None:
        for preempted in schedule.preempted:
            self._states[preempted.state.sequence.sequence_id] = preempted.state
            self._num_preemptions[preempted.made_room_for] += 1
        if schedule.preempted:
            self._vision.drop_orphans()

    def _free_ended(self, ended: list[Ended]) -> None:
        for end in ended:
            self._free(end.state)
        errors = [end.error for end in ended if end.error is not None]
        lacks_memory = any(is_out_of_memory(error) for error in errors)
        if lacks_memory or any(isinstance(error, EngineError) for error in errors):
            # It may be what the next pass lacks, or the cause of logits that are not finite.
            self.admission.clear()
        if lacks_memory:
            self.backend.release_idle_memory()

    def _free(self, state: SequenceState) -> None:
        """The one place where a sequence leaves."""
        state.is_finished = True
        del self._states[state.sequence.sequence_id]
        self.scheduler.remove(state)
        self.admission.release(state)
        self._vision.drop_orphans()
        state.sequence.stage = Stage.FINISHED

    def _check_idle(self) -> None:
        """With no sequence in the engine, only items without a holder may be left."""
        if self.admission.leaked_bytes:
            logger.error("%d cached bytes have leaked", self.admission.leaked_bytes)
        try:
            self.backend.check(num_prefixes=self.admission.num_prefixes)
        except AssertionError as error:
            logger.error("the KV cache is not whole: %s", error)


def _check_has_video(sequence: Sequence) -> None:
    if sequence.frames is None:
        raise InvalidRequestError("without a video there is nothing to compress")
