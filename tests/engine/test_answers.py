"""What becomes of a step's tokens: events, ends, replays, and failures that are one sequence's."""

from typing import NoReturn

import pytest

from dycoke_core.engine.answers import Answers
from dycoke_core.engine.executor import Answer, Failure, Outcome
from dycoke_core.engine.state import SequenceState
from dycoke_core.errors import EngineError, OutOfMemoryError
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import FinishReason
from tests.engine.recording import RecordingEngine, make_sequence

WORD = 100  # an id of the bundled tokenizer that ends nothing


@pytest.fixture
def answers(engine: RecordingEngine, tiny_model: LlavaOnevision) -> Answers:
    return Answers(tiny_model, engine.backend)


def running(
    engine: RecordingEngine, name: str = "a", *, max_tokens: int = 3, **sampling: object
) -> SequenceState:
    """A sequence that the engine has admitted, and of which no token is known."""
    engine.add(make_sequence(name, max_tokens=max_tokens, **sampling))
    state = engine.states[name]
    while state.prefix is None:
        engine.step()
    return state


def token(state: SequenceState, token_id: int | None = WORD, *, is_finite: bool = True) -> Answer:
    return Answer(state, token_id, is_finite, num_refreshes=0)


def end(engine: RecordingEngine, state: SequenceState) -> None:
    engine.abort(state.sequence.sequence_id)


def test_tokens_become_events_and_the_last_one_ends_the_answer(
    engine: RecordingEngine, answers: Answers
) -> None:
    state = running(engine)
    events = []
    for _ in range(3):
        made, ended = answers.postprocess(Outcome([token(state)]))
        events += made
    assert [(event.index, event.token_ids) for event in events] == [
        (0, (WORD,)),
        (1, (WORD,)),
        (2, (WORD,)),
    ]
    assert [event.finish_reason for event in events] == [None, None, FinishReason.LENGTH]
    assert events[0].prompt_tokens == state.num_prompt_tokens and events[1].prompt_tokens is None
    assert [one.state for one in ended] == [state] and ended[0].error is None
    report = events[-1].report
    assert report is not None and report.completion_tokens == 3
    assert report.text == "".join(event.text for event in events)
    end(engine, state)


def test_an_end_token_stops_unless_it_is_to_be_ignored(
    engine: RecordingEngine, answers: Answers, tiny_model: LlavaOnevision
) -> None:
    (eos,) = sorted(tiny_model.eos_token_ids)[:1]
    stops, goes_on = running(engine, "a"), running(engine, "b", ignore_eos=True)
    events, ended = answers.postprocess(Outcome([token(stops, eos), token(goes_on, eos)]))
    assert [event.finish_reason for event in events] == [FinishReason.STOP, None]
    assert [one.state for one in ended] == [stops]
    end(engine, stops)
    end(engine, goes_on)


def test_tokens_that_come_after_the_end_are_nobodys(
    engine: RecordingEngine, answers: Answers
) -> None:
    state = running(engine, max_tokens=1)
    answers.postprocess(Outcome([token(state)]))
    assert answers.postprocess(Outcome([token(state)])) == ([], [])
    late = Failure(state, EngineError("too late"))
    assert answers.postprocess(Outcome(failures=[late])) == ([], [])
    end(engine, state)


def test_logits_that_are_not_finite_end_one_sequence(
    engine: RecordingEngine, answers: Answers
) -> None:
    bad, good = running(engine, "a"), running(engine, "b")
    events, ended = answers.postprocess(Outcome([token(bad, is_finite=False), token(good)]))
    by_name = {event.sequence_id: event for event in events}
    assert by_name["a"].finish_reason is FinishReason.ERROR
    assert isinstance(by_name["a"].error, EngineError) and by_name["a"].token_ids == ()
    assert by_name["b"].token_ids == (WORD,)
    assert [one.state for one in ended] == [bad] and ended[0].error is not None
    end(engine, bad)
    end(engine, good)


def test_a_failure_says_nothing_of_its_inside(engine: RecordingEngine, answers: Answers) -> None:
    state = running(engine)
    failure = Failure(state, KeyError("a secret"))
    (event,), (ended,) = answers.postprocess(Outcome(failures=[failure]))
    assert event.error is not None and "secret" not in event.error.message
    assert isinstance(ended.error, KeyError) and state.is_finished
    end(engine, state)


def test_an_answer_whose_report_fails_ends_with_an_error(
    engine: RecordingEngine, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nobody would hear of it again, and it would keep its memory."""

    def fails(*_: object) -> NoReturn:
        raise MemoryError

    monkeypatch.setattr("dycoke_core.engine.answers.make_report", fails)
    state = running(engine, max_tokens=1)
    events, ended = answers.postprocess(Outcome([token(state)]))
    end(engine, state)
    assert [event.finish_reason for event in events] == [FinishReason.ERROR]
    assert isinstance(events[0].error, OutOfMemoryError)
    assert [one.state for one in ended] == [state]


def test_a_broken_device_ends_the_engine(engine: RecordingEngine, answers: Answers) -> None:
    state = running(engine)
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError):
        answers.postprocess(Outcome(failures=[Failure(state, error)]))
    end(engine, state)


def test_a_replay_makes_events_of_new_tokens_alone(
    engine: RecordingEngine, answers: Answers
) -> None:
    state = running(engine)
    state.forced_token_ids = (WORD, WORD + 1)
    for _ in range(2):
        assert answers.postprocess(Outcome([token(state, None)])) == ([], [])
    assert state.sequence.output_token_ids == [WORD, WORD + 1]
    (event,), (ended,) = answers.postprocess(Outcome([token(state)]))
    assert (event.index, event.token_ids) == (2, (WORD,))
    assert event.finish_reason is FinishReason.LENGTH and ended.state is state
    end(engine, state)


def test_a_replay_that_was_complete_ends_with_an_event_without_tokens(
    engine: RecordingEngine, answers: Answers
) -> None:
    state = running(engine, max_tokens=2)
    state.forced_token_ids = (WORD, WORD + 1)
    assert answers.postprocess(Outcome([token(state, None)])) == ([], [])
    (event,), _ = answers.postprocess(Outcome([token(state, None)]))
    assert (event.index, event.token_ids, event.text) == (2, (), "")
    assert event.finish_reason is FinishReason.LENGTH and event.report is not None
    end(engine, state)
