"""What policy `auto` goes by in a real engine: its backlog, what is cached, what fits."""

import pytest

from dycoke_core.auto import DEFAULT_LADDER, AutoConfig, Choice, Rates, Reason
from dycoke_core.config import PRIORITIES, CompressionConfig
from dycoke_core.engine.auto_compression import AutoCompression
from dycoke_core.engine.engine import Engine
from dycoke_core.errors import InvalidRequestError, PromptTooLongError
from dycoke_core.sequence import Sequence
from tests.engine.lab import Lab

PATCH_S, TOKEN_S = 0.0001, 0.001
NUM_FRAMES = 8


def choose(
    engine: Engine,
    sequence: Sequence,
    objective_s: float,
    *,
    at_least: float = 0.0,
    waited_s: float = 0.0,
) -> Choice:
    """With rates that are known: nothing is measured while a test looks."""
    rates = Rates(PATCH_S, TOKEN_S, 0.0, max_prompt_tokens=10**6)
    auto = AutoCompression(engine.model, engine.admission, engine._scheduler, rates)
    return auto.choose(sequence, AutoConfig(objective_s, at_least), waited_s=waited_s)


def predicted_s(lab: Lab, place: int) -> float:
    """Of a sequence that has an idle engine for itself."""
    sequence = lab.sequence(compression=DEFAULT_LADDER[place].as_dict())
    state = lab.engine().admission.prepare(sequence)
    size = lab.model.image_size
    num_patches = lab.model.vision_geometry(size, size).num_patches
    return PATCH_S * num_patches * len(state.distinct_units) + TOKEN_S * state.num_prompt_tokens


def test_an_idle_engine_is_chosen_for_by_what_the_sequence_costs(lab: Lab) -> None:
    seconds = [predicted_s(lab, place) for place in range(4)]
    assert seconds == sorted(seconds, reverse=True)
    engine, sequence = lab.engine(), lab.sequence()
    for place, needed_s in enumerate(seconds):
        choice = choose(engine, sequence, needed_s + 1e-6)
        assert (choice.level, choice.reason) == (place, Reason.OBJECTIVE)
        assert choice.predicted_ttft_s == pytest.approx(needed_s)
    assert choose(engine, sequence, seconds[-1] / 2).reason is Reason.NONE_MEETS
    assert choose(engine, sequence, seconds[0] + 1.0, waited_s=1.1).level > 0


def test_the_backlog_counts_with_what_is_shared_counted_once(lab: Lab) -> None:
    engine = lab.engine()
    alone_s = predicted_s(lab, 0)
    for name, video in (("a", 1), ("b", 1), ("c", 2)):
        engine.add(lab.sequence(name, video=video, compression="full"))
    fresh = choose(engine, lab.sequence("d", video=3), 100.0).predicted_ttft_s
    state = engine.admission.prepare(lab.sequence("e"))
    questions_s = TOKEN_S * state.num_question_tokens
    assert fresh == pytest.approx(3 * alone_s + questions_s)
    known = choose(engine, lab.sequence("d", video=1), 100.0)
    assert known.predicted_ttft_s == pytest.approx(2 * alone_s + 2 * questions_s)
    engine.drain()
    assert choose(engine, lab.sequence("d", video=3), 100.0).predicted_ttft_s == pytest.approx(
        alone_s
    )


def test_a_prefix_that_is_there_beats_one_level_more_of_tokens(lab: Lab) -> None:
    engine = lab.engine()
    engine.run(lab.sequence("before", compression=DEFAULT_LADDER[1].as_dict()))
    choice = choose(engine, lab.sequence("a"), 100.0)
    assert (choice.level, choice.reason) == (1, Reason.CACHED)
    kept_all = choose(engine, lab.sequence("a"), 100.0, at_least=0.9)
    assert (kept_all.level, kept_all.reason) == (0, Reason.OBJECTIVE)
    question_s = TOKEN_S * engine.admission.prepare(lab.sequence("b")).num_question_tokens
    assert choice.predicted_ttft_s == pytest.approx(question_s)


def test_levels_that_do_not_fit_are_left_out(lab: Lab) -> None:
    sequence = lab.sequence(max_tokens=12)
    states = [
        lab.engine().admission.prepare(lab.sequence(compression=level.as_dict(), max_tokens=12))
        for level in DEFAULT_LADDER
    ]
    backend = lab.engine().backend
    needed = [
        backend.prefix_bytes(state.layout.prefix) + backend.seat_bytes(state.layout)
        for state in states
    ]
    engine = lab.engine(kv_cache_bytes=needed[1])
    assert choose(engine, sequence, 100.0).level == 1
    with pytest.raises(PromptTooLongError):
        choose(lab.engine(kv_cache_bytes=needed[3] // 2), sequence, 100.0)


def test_the_engine_measures_as_it_runs_and_answers_as_if_asked_for_the_level(lab: Lab) -> None:
    engine = lab.engine()
    engine.run(lab.sequence("before", video=2))
    sequence = lab.sequence("a")
    choice = engine.choose_compression(sequence, AutoConfig(objective_s=3600.0))
    assert choice.compression == CompressionConfig("full")
    assert 0 < choice.predicted_ttft_s < 3600
    sequence.compression = choice.compression
    engine.run(sequence)
    assert sequence.output_token_ids == lab.alone(compression="full").token_ids


def test_a_conversation_without_a_video_has_nothing_to_choose(lab: Lab) -> None:
    sequence = lab.sequence()
    sequence.frames = sequence.timing = None
    with pytest.raises(InvalidRequestError, match="without a video"):
        lab.engine().choose_compression(sequence, AutoConfig())


# --- whether a deadline can be met ---


def test_a_first_token_is_predicted_once_its_kind_of_work_has_run(lab: Lab) -> None:
    engine = lab.engine()
    question, other = lab.sequence("question"), lab.sequence("b")
    for sequence in (question, other):
        sequence.frames = sequence.timing = None
    assert engine.predict_first_token_s(lab.sequence()) is None
    assert engine.predict_first_token_s(question) is None
    engine.run(question)
    assert engine.predict_first_token_s(lab.sequence()) is None, "no video was encoded yet"
    assert (engine.predict_first_token_s(other) or 0) > 0
    engine.run(lab.sequence("before", video=2))
    assert (engine.predict_first_token_s(lab.sequence()) or 0) > 0


def test_who_has_to_make_way_does_not_count_against_a_first_token(lab: Lab) -> None:
    engine = lab.engine()
    rates = Rates(PATCH_S, TOKEN_S, 0.0, max_prompt_tokens=10**6)
    rates.note_vision(1, PATCH_S, 1)
    rates.note_pass(TOKEN_S, num_prompt_tokens=1, is_decoding=False)
    auto = AutoCompression(engine.model, engine.admission, engine._scheduler, rates)
    alone_s = predicted_s(lab, 0)
    for number, priority in enumerate(PRIORITIES):
        ahead = lab.sequence(priority, video=number, compression="full")
        ahead.priority = priority
        engine.add(ahead)
    for number, priority in enumerate(PRIORITIES):
        sequence = lab.sequence("d", video=9, compression="full")
        sequence.priority = priority
        assert auto.first_token_s(sequence) == pytest.approx((number + 2) * alone_s)
