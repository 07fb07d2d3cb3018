"""Carries out what the scheduler decided: the vision tower, stage I, and one pass over all rows.

If a pass fails, it is run again one sequence at a time, so that only the sequences at fault end. On
a device that lags behind the host, a step's outcome comes back with a later step; the executor
keeps launched steps in order and has no more of them outstanding than the backend allows.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from dycoke_core.config import Priority
from dycoke_core.engine.admission import Admission
from dycoke_core.engine.backend import Backend, KeptPlaces, Mark, Pending, PrefixChunk, StepPlan
from dycoke_core.engine.faults import has_broken_device, is_out_of_memory
from dycoke_core.engine.prefix_cache import Video
from dycoke_core.engine.scheduler import Schedule
from dycoke_core.engine.state import SequenceState
from dycoke_core.engine.vision_encoder import VisionEncoder, VisionSlice
from dycoke_core.model.adapter import EmbeddedPrefix, VideoLanguageModel
from dycoke_core.precedence import best
from dycoke_core.rates import Rates

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """One sequence's next token, as it came back. token_id: None for a forced one."""

    state: SequenceState
    token_id: int | None
    is_finite: bool
    num_refreshes: int
    kept: KeptPlaces | None = None  # see `StepOutcome`


class Failure(NamedTuple):
    state: SequenceState
    error: Exception


@dataclass(slots=True)
class Outcome:
    """What became known in a step. A sequence's answers came before its failure."""

    answers: list[Answer] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


# Called after each pass is launched, with the sequences that choose a token, in plan order.
Observer = Callable[[StepPlan, tuple[SequenceState, ...], Pending], None]


@dataclass(slots=True)
class _Launched:
    """A pass whose outcome is outstanding, and the sequences that its time counts for."""

    pending: Pending
    answering: tuple[SequenceState | None, ...]  # None: more of the question is to come
    began: Mark
    ended: Mark
    decoding: tuple[SequenceState, ...]
    prefilling: tuple[SequenceState, ...]
    num_prompt_tokens: int


@dataclass(slots=True)
class _Timed:
    """Vision or stage I, timed once the device has got past it."""

    began: Mark
    ended: Mark
    encoding: tuple[SequenceState, ...] = ()
    vision: VisionSlice | None = None  # None: there was nothing to encode
    compressing: SequenceState | None = None


class Executor:
    def __init__(
        self,
        model: VideoLanguageModel,
        backend: Backend,
        vision: VisionEncoder,
        admission: Admission,
        rates: Rates,
        observer: Observer | None = None,
    ) -> None:
        self._model = model
        self._backend = backend
        self._vision = vision
        self._admission = admission
        self._rates = rates
        self._observer = observer
        self._slices: list[float] = []  # seconds of the slices of one micro-batch
        self._batch = 0  # its number
        self._launched: deque[_Launched | _Timed] = deque()

    @property
    def has_outstanding(self) -> bool:
        return any(isinstance(item, _Launched) for item in self._launched)

    def run(self, schedule: Schedule[SequenceState]) -> Outcome:
        """Launches a step, and collects what may not stay outstanding any longer.

        Raises:
            RuntimeError: the device is lost.
        """
        outcome = Outcome()
        if schedule.encode:
            self._encode(schedule, outcome)
        rows = schedule.prefixes or schedule.questions or schedule.decode
        if rows or schedule.encode:  # also without rows: its outcome shows when vision is through
            self._run_rows(schedule, outcome)
            self._collect(outcome, max_outstanding=self._backend.depth)
        else:
            self._collect(outcome, max_outstanding=0)
        if outcome.failures:  # what they chose before is on its way
            self._collect(outcome, max_outstanding=0)
        if schedule.encode or schedule.prefixes or schedule.questions:
            self._note_peak(schedule)
        return outcome

    # --- vision and stage I ---

    def _encode(self, schedule: Schedule[SequenceState], outcome: Outcome) -> None:
        """One slice of the vision tower; stage I for the prefixes whose videos it completes."""
        began = self._backend.mark()
        pending = _pending_videos(schedule)
        ran: VisionSlice | None = None
        try:
            if pending:
                beside_decode = bool(schedule.decode)
                ran = self._vision.encode_slice(pending, beside_decode=beside_decode)
        except Exception as error:
            if has_broken_device(error):
                raise
            logger.warning("a batch of frames failed", exc_info=error)
            culprits = self._vision.drop_failed_batch()
            outcome.failures += [
                Failure(state, error)
                for state in schedule.encode
                if state.held_prefix.video in culprits
            ]
            return
        encoding = tuple(state for state in schedule.encode if state.has_video)
        if encoding:
            ended = self._backend.mark()
            self._launched.append(_Timed(began, ended, encoding=encoding, vision=ran))
        for state in schedule.encode:
            self._embed(state, outcome)

    def _embed(self, state: SequenceState, outcome: Outcome) -> None:
        """Hands the embedded prefix to the backend, once its video, if it has one, is encoded."""
        prefix, video = state.held_prefix, state.held_prefix.video
        if prefix.is_embedded or (video is not None and not video.is_ready):
            return
        began = self._backend.mark()
        try:
            if video is None:
                embedded = self._model.embed_text(state.prompt)
            else:
                embedded = self._compress(state, video)
            self._backend.embed_prefix(prefix.number, embedded)
        except Exception as error:
            outcome.failures.append(Failure(state, error))
            return
        prefix.is_embedded = True
        if video is not None:
            self._launched.append(_Timed(began, self._backend.mark(), compressing=state))

    def _compress(self, state: SequenceState, video: Video) -> EmbeddedPrefix:
        """Stage I: selects visual tokens, and puts the prefix together around them."""
        assert video.features is not None
        features = video.features.index_select(0, self._model.integers(video.sources))
        tokens = features[..., : self._model.text_geometry.hidden_size]
        kept = state.policy.select_visual_tokens(tokens)
        if any(spec.window is not None for spec in self._model.layers):
            kept, _ = kept.sort()  # windows are looked up by ascending positions
        assert len(kept) == state.num_visual_tokens
        kept_per_unit = count_per_unit(state, kept)
        state.held_prefix.kept_per_unit = kept_per_unit
        state.held_prefix.kept = kept
        return self._model.embed(state.prompt, features, kept, kept_per_unit)

    # --- passes ---

    def _run_rows(self, schedule: Schedule[SequenceState], outcome: Outcome) -> None:
        """Runs one pass for all rows; if it fails, one for each, so that only the culprits end."""
        self._collect(outcome, max_outstanding=self._backend.depth)
        lacks_memory = False
        try:
            self._launch(schedule)
        except Exception as error:
            owners = _owners(schedule)
            if len(owners) == 1:
                outcome.failures.append(Failure(owners[0], error))
                return
            if has_broken_device(error):
                raise
            lacks_memory = is_out_of_memory(error)
        else:
            self._finish_prefixes(schedule, outcome)
            return
        # Not in `except`, whose traceback holds the failed pass's tensors.
        if lacks_memory:
            self._admission.clear()
            self._backend.release_idle_memory()
        for single in _singles(schedule):
            self._run_rows(single, outcome)

    def _launch(self, schedule: Schedule[SequenceState]) -> None:
        """Raises whatever the backend raised; nothing has changed then."""
        plan = StepPlan(
            prefixes=tuple(
                PrefixChunk(prefix.number, prefix.num_run, chunk.num_tokens)
                for chunk in schedule.prefixes
                if (prefix := chunk.state.held_prefix)
            ),
            questions=tuple(
                chunk.state.question_chunk(chunk.num_tokens) for chunk in schedule.questions
            ),
            decode=tuple(state.decode_row() for state in schedule.decode),
        )
        answering = (*(chunk.state for chunk in schedule.questions), *schedule.decode)
        began = self._backend.mark()
        for chunk in schedule.questions:
            if (recording := chunk.state.kept_recording) is not None:
                recording.begin(chunk.state.held_prefix.kept)
        pending = self._backend.run(plan)
        if self._observer is not None and answering:
            self._observer(plan, answering, pending)
        for prefix_chunk in schedule.prefixes:
            prefix_chunk.state.held_prefix.num_run += prefix_chunk.num_tokens
        for chunk in schedule.questions:
            chunk.state.note_launched(chunk.num_tokens)
        for state in schedule.decode:
            state.note_launched(1)
        decoding = {id(state) for state in schedule.decode}
        prefilling = [
            state
            for state in schedule.running
            if plan and id(state) not in decoding and state.held_prefix.is_embedded
        ]
        self._launched.append(
            _Launched(
                pending,
                tuple(state if state.num_chosen else None for state in answering),
                began,
                self._backend.mark(),
                decoding=schedule.decode,
                prefilling=tuple(prefilling),
                num_prompt_tokens=sum(
                    chunk.num_tokens for chunk in (*schedule.prefixes, *schedule.questions)
                ),
            )
        )

    def _finish_prefixes(self, schedule: Schedule[SequenceState], outcome: Outcome) -> None:
        """Makes prefixes ready for sharing once their prefill is through."""
        for chunk in schedule.prefixes:
            prefix = chunk.state.held_prefix
            if prefix.num_run < prefix.num_tokens:
                continue
            try:
                self._admission.finish_prefix(chunk.state)
            except Exception as error:
                doomed = [other for other in schedule.running if other.prefix is prefix]
                outcome.failures += [Failure(other, error) for other in doomed]

    # --- outcomes ---

    def _collect(self, outcome: Outcome, *, max_outstanding: int) -> None:
        """Takes outcomes in, oldest first, until at most this many are outstanding."""
        num_outstanding = sum(isinstance(item, _Launched) for item in self._launched)
        while num_outstanding > max_outstanding:
            item = self._launched.popleft()
            if isinstance(item, _Timed):
                self._note_prompt_seconds(item)
                continue
            num_outstanding -= 1
            result = self._backend.collect(item.pending)
            rows = zip(
                item.answering,
                result.token_ids,
                result.is_finite,
                result.refreshes,
                result.kept or (None,) * len(item.answering),
                strict=True,
            )
            outcome.answers += [
                Answer(state, token_id, is_finite, num_refreshes, kept)
                for state, token_id, is_finite, num_refreshes, kept in rows
                if state is not None
            ]
            self._note_pass_seconds(item)

    def _note_prompt_seconds(self, item: _Timed) -> None:
        seconds = self._backend.seconds(item.began, item.ended)
        for state in item.encoding:
            state.clock.vision_s += seconds
        if item.vision is not None:
            self._note_slice(item.vision, seconds)
        if item.compressing is not None:
            item.compressing.clock.compress_s += seconds

    def _note_slice(self, ran: VisionSlice, seconds: float) -> None:
        """Measures micro-batches that are completed; one that is dropped counts for nothing."""
        if ran.batch != self._batch:
            self._batch = ran.batch
            self._slices.clear()
        self._slices.append(seconds)
        if ran.num_patches:
            self._rates.note_vision(ran.num_patches, sum(self._slices), len(self._slices))

    def _note_pass_seconds(self, item: _Launched) -> None:
        """Every running sequence waited for the pass, those that had no part in it too."""
        seconds = self._backend.seconds(item.began, item.ended)
        if item.decoding or item.num_prompt_tokens:
            self._rates.note_pass(
                seconds,
                num_prompt_tokens=item.num_prompt_tokens,
                is_decoding=bool(item.decoding),
            )
        for state in item.decoding:
            state.clock.decode_s += seconds
        for state in item.prefilling:
            state.clock.prefill_s += seconds

    def _note_peak(self, schedule: Schedule[SequenceState]) -> None:
        """Decode steps allocate nothing worth counting, so only prompt work moves the peak."""
        peak = self._backend.peak_memory()
        self._backend.reset_peak_memory()
        for state in schedule.running:
            state.peak_device_bytes = max(state.peak_device_bytes, peak)


def _pending_videos(schedule: Schedule[SequenceState]) -> dict[Video, Priority]:
    """Waiting for the tower, longest admitted first, with the best priority of those that want
    each."""
    pending: dict[Video, Priority] = {}
    for state in schedule.encode:
        video = state.held_prefix.video
        if video is not None and not video.is_ready:
            pending[video] = best(pending.get(video, state.priority), state.priority)
    return pending


def _owners(schedule: Schedule[SequenceState]) -> list[SequenceState]:
    chunks = [*schedule.prefixes, *schedule.questions]
    return [*(chunk.state for chunk in chunks), *schedule.decode]


def _singles(schedule: Schedule[SequenceState]) -> list[Schedule[SequenceState]]:
    """One schedule for each sequence that has rows in this one."""
    running = schedule.running
    return [
        *(Schedule(running, prefixes=(chunk,)) for chunk in schedule.prefixes),
        *(Schedule(running, questions=(chunk,)) for chunk in schedule.questions),
        *(Schedule(running, decode=(state,)) for state in schedule.decode),
    ]


def count_per_unit(state: SequenceState, kept: Tensor) -> tuple[int, ...]:
    """How many tokens of each unit stage I kept; known beforehand but for selectors that weigh
    units against each other, which waits for the device."""
    num_units, tokens_per_unit = state.prompt.num_units, state.prompt.tokens_per_unit
    counts = state.policy.count_per_frame(num_units, tokens_per_unit)
    if counts is None:
        kept_units = (kept // tokens_per_unit).tolist()
        counts = tuple(kept_units.count(unit) for unit in range(num_units))
    return counts
