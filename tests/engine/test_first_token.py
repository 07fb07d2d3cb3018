"""When a sequence would have its first token if it were added now."""

import pytest

from dycoke_core.auto import DEFAULT_LADDER
from dycoke_core.config import PRIORITIES
from dycoke_core.engine.engine import Engine
from dycoke_core.engine.first_token import FirstTokenPredictor
from dycoke_core.rates import Rates
from dycoke_core.sequence import Sequence
from tests.engine.lab import Lab

PATCH_S, TOKEN_S = 0.0001, 0.001


def predicted_s(engine: Engine, sequence: Sequence) -> float:
    """With rates that are known, as if they had been measured."""
    rates = Rates(PATCH_S, TOKEN_S, 0.0, max_prompt_tokens=10**6)
    rates.note_vision(1, PATCH_S, 1)
    rates.note_pass(TOKEN_S, num_prompt_tokens=1, is_decoding=False)
    predictor = FirstTokenPredictor(engine.model, engine.admission, engine.scheduler, rates)
    predicted = predictor.earliest_s(engine.admission.prepare(sequence))
    assert predicted is not None
    return predicted


def test_nothing_is_predicted_of_work_whose_like_has_not_run(lab: Lab) -> None:
    engine = lab.engine()
    question, other = lab.sequence("question"), lab.sequence("other")
    for sequence in (question, other):
        sequence.frames = sequence.timing = None
    assert engine.predict_first_token_s(lab.sequence()) is None
    assert engine.predict_first_token_s(question) is None
    engine.run(question)
    assert engine.predict_first_token_s(lab.sequence()) is None, "no video was encoded yet"
    assert (engine.predict_first_token_s(other) or 0) > 0
    engine.run(lab.sequence("before", video=2))
    assert (engine.predict_first_token_s(lab.sequence()) or 0) > 0


def test_it_is_predicted_at_the_sequence_s_own_compression(lab: Lab) -> None:
    engine = lab.engine()
    full = predicted_s(engine, lab.sequence("a", compression="full"))
    strong = predicted_s(engine, lab.sequence("b", compression=DEFAULT_LADDER[3].as_dict()))
    assert 0 < strong < full
    engine.add(lab.sequence("c", video=2, compression="full"))
    again = predicted_s(engine, lab.sequence("a", compression="full"))
    assert again == pytest.approx(2 * full)


def test_what_is_shared_with_a_lower_priority_counts(lab: Lab) -> None:
    engine = lab.engine()
    low = lab.sequence("low", compression="full")
    low.priority = "low"
    alone_s = predicted_s(engine, low)
    engine.add(low)
    high = lab.sequence("high", compression="full")
    high.priority = "high"
    assert predicted_s(engine, high) == pytest.approx(alone_s, rel=0.05)


def test_those_of_lower_priority_make_way(lab: Lab) -> None:
    engine = lab.engine()
    alone_s = predicted_s(engine, lab.sequence(compression="full"))
    for number, priority in enumerate(PRIORITIES, 1):
        ahead = lab.sequence(priority, video=number, compression="full")
        ahead.priority = priority
        engine.add(ahead)
    for number, priority in enumerate(PRIORITIES, 1):
        sequence = lab.sequence("last", video=9, compression="full")
        sequence.priority = priority
        assert predicted_s(engine, sequence) == pytest.approx((number + 1) * alone_s)
