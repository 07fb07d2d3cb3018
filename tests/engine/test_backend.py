"""A plan's rows, in the order in which their outcomes come back."""

from dycoke_core.engine.backend import DecodeRow, PrefixChunk, QuestionChunk, StepPlan
from dycoke_core.engine.sampler import Draw
from dycoke_core.sequence import SamplingParams


def draw(index: int) -> Draw:
    return Draw.of_token(SamplingParams(max_tokens=8, temperature=1.0, seed=3), index)


def test_questions_answer_before_decode_rows_and_prefixes_do_not() -> None:
    question = QuestionChunk(seat=1, start=0, token_ids=(5, 6), draw=draw(0))
    replayed = DecodeRow(seat=2, start=4, token_id=9, draw=None)
    decode = DecodeRow(seat=3, start=7, token_id=None, draw=draw(2))
    plan = StepPlan((PrefixChunk(1, 0, 4),), (question,), (replayed, decode))
    assert plan.answering == (question, replayed, decode)
    assert plan.draws == (draw(0), draw(2))  # what is known already is not drawn again


def test_a_plan_of_nothing_is_false() -> None:
    assert not StepPlan()
    assert StepPlan(prefixes=(PrefixChunk(1, 0, 4),))
    assert StepPlan(decode=(DecodeRow(1, 1, 1, None),))
