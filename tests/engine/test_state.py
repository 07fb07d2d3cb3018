"""A sequence's own counts: its prompt, what was launched, what is chosen next, a second run."""

import pytest

from dycoke_core.engine.detokenizer import Detokenizer
from dycoke_core.engine.sampler import Draw
from dycoke_core.engine.state import SequenceState, StageClock
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import Stage
from tests.engine.recording import RecordingEngine, make_sequence


@pytest.fixture
def state(engine: RecordingEngine) -> SequenceState:
    state = engine.admission.prepare(make_sequence())
    state.seat = 3
    return state


def test_a_prompt_is_its_prefix_and_its_question(state: SequenceState) -> None:
    assert state.num_tokens_in == 8 * 49 and state.has_video
    assert state.num_visual_tokens < state.num_tokens_in
    assert state.retained_ratio == state.num_visual_tokens / state.num_tokens_in
    assert state.num_prompt_tokens == state.num_prefix_tokens + state.num_question_tokens
    assert state.num_text_tokens == state.num_prompt_tokens - state.num_visual_tokens > 0


def test_a_question_in_chunks_draws_once_at_its_end(state: SequenceState) -> None:
    length = state.num_question_tokens
    first = state.question_chunk(length - 1)
    assert (first.seat, first.start, first.draw) == (3, 0, None)
    state.note_launched(length - 1)
    assert state.has_prompt_left and state.num_chosen == 0
    last = state.question_chunk(1)
    assert first.token_ids + last.token_ids == state.prompt.question_ids
    assert last.draw is not None
    state.note_launched(1)
    assert not state.has_prompt_left and state.num_chosen == 1


def test_a_step_that_is_launched_before_the_last_has_come_back_knows_no_token(
    state: SequenceState,
) -> None:
    state.note_launched(state.num_question_tokens)
    row = state.decode_row()
    assert row.token_id is None and row.start == state.num_question_tokens
    state.sequence.output_token_ids.append(17)
    assert state.decode_row().token_id == 17
    state.note_launched(1)
    assert state.decode_row().token_id is None and state.num_chosen == 2


def test_nothing_is_decoded_beyond_the_longest_answer(engine: RecordingEngine) -> None:
    state = engine.admission.prepare(make_sequence(max_tokens=2))
    assert not state.can_decode, "the question comes first"
    state.note_launched(state.num_question_tokens)
    assert state.can_decode
    state.note_launched(1)
    assert not state.can_decode and state.num_chosen == 2


def test_a_sampled_token_has_a_draw_of_its_own(engine: RecordingEngine) -> None:
    sequence = make_sequence(temperature=1.0, seed=5)
    state = engine.admission.prepare(sequence)
    state.seat = 0
    state.note_launched(state.num_question_tokens)
    assert state.decode_row().draw == Draw.of_token(sequence.sampling, 1)
    assert Draw.of_token(sequence.sampling, 1) != Draw.of_token(sequence.sampling, 2)


def test_a_sequence_that_is_preempted_runs_what_it_has_again(
    state: SequenceState, tiny_model: LlavaOnevision
) -> None:
    state.note_launched(state.num_question_tokens)
    state.sequence.output_token_ids += [11, 12]
    state.sequence.stage = Stage.DECODING
    again = state.resumed(Detokenizer(tiny_model.prompt_encoder.tokenizer), None)
    assert (again.forced_token_ids, again.num_preemptions) == ((11, 12), 1)
    assert (again.prefix, again.seat, again.num_own_run, again.num_chosen) == (None, None, 0, 0)
    assert again.sequence.output_token_ids == [] and again.sequence.stage is Stage.WAITING
    again.seat = 1
    assert again.question_chunk(again.num_question_tokens).draw is None, "its token is known"
    again.note_launched(again.num_question_tokens)
    assert again.decode_row().token_id == 11 and again.decode_row().draw is None
    again.note_launched(1)
    row = again.decode_row()
    assert row.token_id == 12 and row.draw is not None, "from here on tokens are drawn"


def test_a_second_preemption_forgets_nothing_of_the_first(
    state: SequenceState, tiny_model: LlavaOnevision
) -> None:
    detokenizer = Detokenizer(tiny_model.prompt_encoder.tokenizer)
    state.sequence.output_token_ids += [11, 12, 13]
    again = state.resumed(detokenizer, None)
    again.sequence.output_token_ids.append(11)  # preempted in the middle of its replay
    third = again.resumed(detokenizer, None)
    assert (third.forced_token_ids, third.num_preemptions) == ((11, 12, 13), 2)


def test_steps_of_an_answer_are_one_fewer_than_its_tokens(state: SequenceState) -> None:
    counts = []
    for token in range(3):
        counts.append(state.num_decode_steps)
        state.sequence.output_token_ids.append(token)
    assert [*counts, state.num_decode_steps] == [0, 0, 1, 2]


def test_a_clock_keeps_the_first_start_and_the_first_and_last_token() -> None:
    clock = StageClock()
    clock.note_start()
    started_at = clock.started_at
    clock.note_start()
    assert clock.started_at == started_at
    clock.note_token()
    first_at = clock.first_token_at
    clock.note_token()
    assert clock.first_token_at == first_at
    assert first_at is not None and clock.last_token_at is not None
    assert first_at <= clock.last_token_at
