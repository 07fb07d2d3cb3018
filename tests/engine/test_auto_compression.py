"""What policy `auto` decides by in a real engine: its backlog, what is cached, what fits."""

import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from dycoke_core import frame_content
from dycoke_core.auto import DEFAULT_LADDER, AutoConfig, Choice, Reason
from dycoke_core.config import CompressionConfig
from dycoke_core.engine.auto_compression import AutoCompression
from dycoke_core.engine.engine import Engine
from dycoke_core.engine.first_token import FirstTokenPredictor
from dycoke_core.errors import InvalidRequestError, PromptTooLongError
from dycoke_core.level_choice import NOTHING_WAITS, Outlook
from dycoke_core.rates import Rates
from dycoke_core.sequence import Sequence
from tests.engine.lab import Lab
from tests.engine.recording import report_of

PATCH_S, TOKEN_S = 0.0001, 0.001
NUM_FRAMES = 8


def choose(
    engine: Engine,
    sequence: Sequence,
    objective_s: float,
    *,
    outlook: Outlook = NOTHING_WAITS,
    at_least: float = 0.0,
    waited_s: float = 0.0,
) -> Choice:
    config = AutoConfig(objective_s, at_least)
    return auto_of(engine).choose(sequence, config, outlook, waited_s=waited_s)


def auto_of(engine: Engine, clock: Callable[[], float] = time.monotonic) -> AutoCompression:
    """With rates that are known: nothing is measured while a test looks."""
    rates = Rates(PATCH_S, TOKEN_S, 0.0, max_prompt_tokens=10**6)
    predictor = FirstTokenPredictor(engine.model, engine.admission, engine.scheduler, rates)
    return AutoCompression(engine.admission, predictor, clock=clock)


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


@pytest.mark.parametrize("video_key", [None, "a video"])
def test_the_pixels_of_a_sequence_are_looked_at_once(
    video_key: str | None, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def watch(name: str) -> None:
        look = getattr(frame_content, name)

        def watched(*args: Any) -> Any:
            calls.append(name)
            return look(*args)

        monkeypatch.setattr(frame_content, name, watched)

    watch("distinct_units")
    watch("frames_digest")
    engine, sequence = lab.engine(max_running_sequences=1), lab.sequence(max_tokens=3)
    sequence.video_key, sequence.priority = video_key, "low"
    engine.prefix_key(sequence)
    sequence.compression = engine.choose_compression(sequence, AutoConfig()).compression
    engine.predict_first_token_s(sequence)
    engine.add(sequence)
    engine.step()
    other = lab.sequence("other", max_tokens=1)
    other.priority, other.video_key, other.frame_content = "high", "b", sequence.frame_content
    engine.add(other)  # which the first one makes room for, and is admitted again
    engine.drain()
    assert calls == ["distinct_units"] + ["frames_digest"] * (video_key is None)


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


def test_a_prefix_that_comes_too_late_is_not_waited_for(lab: Lab) -> None:
    """One of low priority makes it, which gives way otherwise."""
    engine = lab.engine()
    low, high = lab.sequence("low", compression="full"), lab.sequence("high")
    low.priority, high.priority = "low", "high"
    engine.add(low)
    tight = choose(engine, high, predicted_s(lab, 3) + 1e-6)
    assert (tight.level, tight.reason) == (3, Reason.OBJECTIVE)
    lax = choose(engine, high, predicted_s(lab, 0) + 1e-6)
    assert lax.level == 0


def test_what_waits_behind_costs_what_requests_cost_of_late(lab: Lab) -> None:
    engine = lab.engine()
    full_s, strongest_s = predicted_s(lab, 0), predicted_s(lab, 3)
    behind = Outlook(waited_s=(0.0, 0.0))
    objective_s = 3 * full_s / 0.8 + 1e-6
    assert choose(engine, lab.sequence(), objective_s, outlook=behind).level == 0
    tight = choose(engine, lab.sequence(), 3 * strongest_s / 0.8 + 1e-6, outlook=behind)
    assert (tight.level, tight.reason) == (3, Reason.QUEUE)
    often = Outlook(arrivals_per_s=1.0 / full_s)
    loaded = choose(engine, lab.sequence(), 3 * full_s, outlook=often)
    assert loaded.level > 0 and loaded.reason is Reason.LOAD


def test_requests_of_other_policies_and_cached_videos_count_towards_what_one_costs(
    lab: Lab,
) -> None:
    engine = lab.engine()
    auto = auto_of(engine)
    alone_s = predicted_s(lab, 0)
    config, often = AutoConfig(3 * alone_s), Outlook(arrivals_per_s=1.0 / alone_s)
    first = lab.sequence("first")
    assert auto.choose(first, config, often, waited_s=0.0).reason is Reason.LOAD
    first.compression = CompressionConfig("full")
    engine.run(first)
    for number in range(60):  # whose prefix is there: at any level it would be
        auto.note_added(engine.admission.prepare(lab.sequence(f"known {number}")))
    laxer = AutoConfig(3.1 * alone_s)  # which is not held to the level before
    again = auto.choose(lab.sequence("again", video=2), laxer, often, waited_s=0.0)
    assert (again.level, again.reason) == (0, Reason.OBJECTIVE)


def test_what_prompts_do_not_explain_counts_while_requests_wait(lab: Lab) -> None:
    """Such as decoding: choices come further apart than prompts take."""
    alone_s = predicted_s(lab, 0)
    now_s = 0.0
    auto = auto_of(lab.engine(), lambda: now_s)
    config = AutoConfig(100 * alone_s)
    one_waits = Outlook(waited_s=(0.0,))
    often = Outlook(waited_s=(30 * alone_s,), arrivals_per_s=0.5 / alone_s)

    def choose_often(outlook: Outlook, apart_s: float) -> None:
        nonlocal now_s
        for number in range(100):
            queued_s = 2 * apart_s if outlook.waited_s else 0.0
            sequence = lab.sequence(str(number))
            auto.choose(sequence, config, outlook, waited_s=0.0, queued_s=queued_s)
            now_s += apart_s

    choose_often(NOTHING_WAITS, 90 * alone_s)  # the engine waits for requests
    assert auto.choose(lab.sequence("a"), config, often, waited_s=0.0).level == 0
    now_s += alone_s
    choose_often(one_waits, 1.5 * alone_s)  # rho is 0.75 now, 0.5 of it from prompts
    assert auto.choose(lab.sequence("b"), config, often, waited_s=0.0).level == 0
    now_s += alone_s
    choose_often(one_waits, 2.0 * alone_s)
    choice = auto.choose(lab.sequence("c"), config, often, waited_s=0.0)
    assert (choice.level > 0, choice.reason) == (True, Reason.LOAD)


def test_what_requests_cost_beside_their_prompts_is_forgotten_once_none_wait(lab: Lab) -> None:
    """Answers were long under the last load, and compression must not stay strong for that."""
    alone_s = predicted_s(lab, 0)
    now_s = 0.0
    auto = auto_of(lab.engine(), lambda: now_s)
    config = AutoConfig(100 * alone_s)
    often = Outlook(waited_s=(30 * alone_s,), arrivals_per_s=0.5 / alone_s)
    for number in range(100):
        auto.choose(lab.sequence(f"long {number}"), config, often, waited_s=0.0, queued_s=now_s)
        now_s += 2.0 * alone_s
    assert auto.choose(lab.sequence("a"), config, often, waited_s=0.0).reason is Reason.LOAD
    for number in range(60):
        now_s += 10.0
        auto.choose(lab.sequence(f"short {number}"), config, NOTHING_WAITS, waited_s=0.0)
    choice = auto.choose(lab.sequence("b"), config, often, waited_s=0.0)
    assert (choice.level, choice.reason) == (0, Reason.OBJECTIVE)


def test_time_without_requests_that_wait_is_no_cost_of_theirs(lab: Lab) -> None:
    """The job that waited at one choice need not be the next that is chosen for."""
    engine = lab.engine()
    alone_s = predicted_s(lab, 0)
    now_s = 0.0
    auto = auto_of(engine, lambda: now_s)
    config = AutoConfig(100 * alone_s)
    one_waits = Outlook(waited_s=(0.0,))
    for number in range(20):
        auto.choose(lab.sequence(f"a {number}"), config, one_waits, waited_s=0.0)
        auto.note_added(engine.admission.prepare(lab.sequence(f"fixed {number}")))
        now_s += 90 * alone_s  # and nothing comes
    again = lab.sequence("again")
    for number in range(20):  # as no choice can be stored
        queued_s = 91 * alone_s if number else 0.0
        auto.choose(again, config, one_waits, waited_s=0.0, queued_s=queued_s)
        now_s += 90 * alone_s
    often = Outlook(waited_s=(30 * alone_s,), arrivals_per_s=0.5 / alone_s)
    auto.choose(again, config, often, waited_s=0.0)
    now_s += alone_s
    choice = auto.choose(lab.sequence("b"), config, often, waited_s=0.0, queued_s=2 * alone_s)
    assert choice.level == 0


def test_a_choice_waits_until_little_is_left_ahead_of_it(lab: Lab) -> None:
    engine = lab.engine()
    auto = auto_of(engine)
    alone_s = predicted_s(lab, 0)
    engine.add(lab.sequence("ahead", compression="full"))
    assert not auto.can_choose(AutoConfig(8 * alone_s * 0.99))
    assert auto.can_choose(AutoConfig(8 * alone_s * 1.01))
    engine.drain()
    assert auto.can_choose(AutoConfig(1e-9))


def test_a_cached_level_is_chosen_before_the_turn_and_only_if_the_rule_takes_it(lab: Lab) -> None:
    engine = lab.engine()
    config = AutoConfig(objective_s=3600.0)
    unknown = engine.choose_cached(lab.sequence("a"), config)
    assert unknown.choice is None and len(unknown.prefix_keys) == 4
    key = engine.add(lab.sequence("b", compression=DEFAULT_LADDER[1].as_dict()))
    assert key in unknown.prefix_keys and engine.has_prefix(key), "it is on its way"
    known = engine.choose_cached(lab.sequence("a"), config)
    assert known.choice is not None
    assert (known.choice.level, known.choice.reason) == (1, Reason.CACHED)
    assert engine.choose_cached(lab.sequence("a", video=2), config).choice is None
    engine.drain()
    sequence = lab.sequence("a")
    choice = engine.choose_cached(sequence, config).choice
    assert choice is not None and choice.level == 1
    sequence.compression = choice.compression
    assert engine.prefix_key(sequence) == key
    assert report_of(engine.run(sequence)["a"]).cache.has_prefix_hit
    kept_all = engine.choose_cached(lab.sequence("c"), AutoConfig(3600.0, at_least=0.9))
    assert (
        kept_all.choice is None
        and len(kept_all.prefix_keys) == 1
        and key not in (kept_all.prefix_keys)
    )


def test_an_engine_that_was_asked_for_a_prefix_holds_no_pixels(lab: Lab) -> None:
    engine = lab.engine()
    sequence = lab.sequence("a")
    assert sequence.frames is not None
    sequence.frames = sequence.frames.copy()  # the lab keeps its own
    held = weakref.ref(sequence.frames)
    engine.add(lab.sequence("b", compression="full"))
    assert engine.choose_cached(sequence, AutoConfig(objective_s=3600.0)).choice is not None
    engine.prefix_key(sequence)
    del sequence
    gc.collect()
    assert held() is None
    engine.drain()


def test_a_sequence_that_is_chosen_for_again_counts_once(lab: Lab) -> None:
    engine = lab.engine()
    auto = auto_of(engine)
    alone_s = predicted_s(lab, 0)
    config = AutoConfig(3 * alone_s)
    engine.run(lab.sequence("known", compression="full"))
    for number in range(60):
        auto.choose(lab.sequence(str(number), video=2), config, waited_s=0.0)
    sequence = lab.sequence("a")
    for _ in range(60):  # whose prefix is there: it would make requests look cheap
        auto.choose(sequence, config, waited_s=0.0)
    often = Outlook(arrivals_per_s=1.0 / alone_s)
    laxer = AutoConfig(3.1 * alone_s)
    assert auto.choose(lab.sequence("b", video=2), laxer, often, waited_s=0.0).reason is Reason.LOAD


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
    assert choose(engine, sequence, 100.0, at_least=0.5).level == 1
    with pytest.raises(PromptTooLongError):  # rather than less than the request allows
        choose(engine, sequence, 100.0, at_least=0.9)
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
