"""Turns a step's outcome into events: tokens become text, answers end, reports are made.

Owns no device and no queue. It says which sequences have ended; the engine frees them.
"""

import logging
from dataclasses import dataclass, replace

from dycoke_core.engine.backend import Backend
from dycoke_core.engine.executor import Answer, Failure, Outcome
from dycoke_core.engine.faults import has_broken_device, public_error
from dycoke_core.engine.report import make_report
from dycoke_core.engine.state import SequenceState
from dycoke_core.errors import EngineError
from dycoke_core.model.adapter import VideoLanguageModel
from dycoke_core.sequence import FinishReason, TokenEvent

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence that has ended; `error` if it failed."""

    state: SequenceState
    error: Exception | None = None


class Answers:
    def __init__(self, model: VideoLanguageModel, backend: Backend) -> None:
        self._model = model
        self._backend = backend

    def postprocess(self, outcome: Outcome) -> tuple[list[TokenEvent], list[Ended]]:
        """Events of a step, and the sequences that ended in it.

        Raises:
            Exception: a failure of the device, which ends the engine.
        """
        events: list[TokenEvent] = []
        ended: list[Ended] = []
        for answer in outcome.answers:
            if answer.state.is_finished:
                continue  # it ended while this step was on its way
            try:
                event = self._take(answer)
            except Exception as error:
                self._fail(Failure(answer.state, error), events, ended)
                continue
            if event is not None:
                events.append(event)
                if event.finish_reason is not None:
                    ended.append(Ended(answer.state))
        for failure in outcome.failures:
            self._fail(failure, events, ended)
        return events, ended

    def _take(self, answer: Answer) -> TokenEvent | None:
        """Takes the sampled token, or the next forced one, which makes no event.

        A forced token that ends the answer, because the attempt before died between its last token
        and its receipt, makes an event without tokens.
        """
        state, sequence = answer.state, answer.state.sequence
        if not answer.is_finite:
            raise EngineError("the model's logits are not finite: it may need another dtype")
        state.num_refreshes = answer.num_refreshes
        index = len(sequence.output_token_ids)
        is_forced = index < state.num_forced
        token_id = state.forced_token_ids[index] if is_forced else answer.token_id
        assert token_id is not None
        if state.kept_recording is not None and answer.kept is not None:
            state.kept_recording.add(index, answer.kept)
        sequence.output_token_ids.append(token_id)
        text = state.detokenizer.push(token_id)
        is_replaying = len(sequence.output_token_ids) < state.num_forced
        finish_reason = None if is_replaying else self._finish_reason(state, token_id)
        if finish_reason is not None:
            text += state.detokenizer.flush()
        if is_forced and finish_reason is None:
            return None
        state.clock.note_token()
        event = TokenEvent(
            sequence_id=sequence.sequence_id,
            index=index + 1 if is_forced else index,
            token_ids=() if is_forced else (token_id,),
            text="" if is_forced else text,
            finish_reason=finish_reason,
            prompt_tokens=state.num_prompt_tokens if index == 0 else None,
        )
        if finish_reason is None:
            return event
        report = make_report(self._model, state, self._backend)
        state.is_finished = True  # not before: what has failed is still to be ended
        return replace(event, report=report)

    def _finish_reason(self, state: SequenceState, token_id: int) -> FinishReason | None:
        sampling = state.sequence.sampling
        is_end = token_id in self._model.eos_token_ids and not sampling.ignore_eos
        if is_end or state.detokenizer.is_stopped:
            return FinishReason.STOP
        if len(state.sequence.output_token_ids) >= sampling.max_tokens:
            return FinishReason.LENGTH
        return None

    def _fail(self, failure: Failure, events: list[TokenEvent], ended: list[Ended]) -> None:
        """Ends one sequence, or all of them if the device has failed."""
        state, error = failure
        if has_broken_device(error):
            raise error
        if state.is_finished:
            return
        state.is_finished = True
        sequence = state.sequence
        logger.error("sequence failed", exc_info=error, extra={"sequence_id": sequence.sequence_id})
        ended.append(Ended(state, error))
        events.append(
            TokenEvent(
                sequence_id=sequence.sequence_id,
                index=len(sequence.output_token_ids),
                token_ids=(),
                text="",
                finish_reason=FinishReason.ERROR,
                error=public_error(error),
            )
        )
