"""Sequences that make room for better priorities: their answers pause, and are what they were."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dycoke_core.config import Priority
from dycoke_core.engine.preemption import MAX_PREEMPTIONS
from dycoke_core.sequence import CacheReport, Sequence, Stage, TokenEvent
from tests.engine.family_checks import assert_answer_that_made_room_is_the_same
from tests.engine.lab import Lab
from tests.engine.making_room import (
    HIGH,
    LOW,
    high_of,
    preempt,
    prioritized,
    tight_engine,
    tokens_of,
)
from tests.engine.mixes import (
    Mix,
    assert_mix_equals_single_runs,
    mixes_are_random,
    mixes_of_priorities,
)
from tests.engine.recording import (
    MAX_STEPS,
    RecordingEngine,
    assert_same,
    counts,
    report_of,
    steps_until_tokens,
)

POLICIES: dict[str, dict[str, Any]] = {
    "full": {"compression": "full"},
    "default": {},
    "gated": {"compression": {"policy": "dycoke", "threshold": 0.1, "l": 2}},
    "one shot": {"compression": "dycoke_one_shot"},
    "random": {"compression": {"policy": "random_kv", "threshold": 0.1, "seed": 2}},
    "drawn": {"temperature": 0.9, "top_p": 0.8, "seed": 5},
}


@pytest.mark.parametrize(
    ("policy", "dp_cache"), [*((policy, "device") for policy in POLICIES), ("gated", "host")]
)
def test_an_answer_that_made_room_is_what_it_would_have_been(
    policy: str, dp_cache: str, lab: Lab
) -> None:
    assert_answer_that_made_room_is_the_same(LOW | POLICIES[policy], HIGH, lab, dp_cache=dp_cache)


def test_whoever_makes_room_waits_until_the_other_has_ended(lab: Lab) -> None:
    engine = tight_engine(lab, LOW, HIGH)
    engine.add(prioritized(lab, "low", "low", **LOW))
    steps_until_tokens(engine, "low", 5)
    engine.add(prioritized(lab, "high", "high", **HIGH))
    ended = []
    assert engine.step() == [], "a token that was on its way is chosen again"
    assert engine.states["low"].sequence.stage is Stage.WAITING
    assert (engine.stats().num_running, engine.stats().num_waiting) == (1, 1)
    for _ in range(MAX_STEPS):
        if not engine.has_work:
            break
        ended += [event.sequence_id for event in engine.step() if event.finish_reason]
    assert ended == ["high", "low"]


def test_what_an_earlier_attempt_published_and_what_came_since_are_replayed(lab: Lab) -> None:
    whole = lab.alone(**LOW).token_ids
    low = prioritized(lab, "low", "low", **LOW, forced=tuple(whole[:3]))
    engine = tight_engine(lab, LOW, HIGH)
    events = preempt(engine, low, high_of(lab), num_tokens=6)["low"]
    assert [event.index for event in events] == list(range(3, 12))
    assert [token for event in events for token in event.token_ids] == whole[3:]
    assert report_of(events).completion_tokens == 12


def test_a_replay_that_makes_room_loses_nothing(lab: Lab) -> None:
    """It has run fewer tokens again than it had."""
    engine = tight_engine(lab, LOW, HIGH)
    low = prioritized(lab, "low", "low", **LOW)
    engine.add(low)
    events = {"low": steps_until_tokens(engine, "low", 6)}
    engine.add(prioritized(lab, "first", "high", **HIGH))
    while "first" in engine.states or len(low.output_token_ids) < 2:
        events["low"] += [event for event in engine.step() if event.sequence_id == "low"]
    assert len(low.output_token_ids) < 6
    engine.add(prioritized(lab, "second", "high", **HIGH))
    engine.step()
    assert engine.states["low"].seat is None
    events["low"] += engine.drain()["low"]
    assert tokens_of(events["low"]) == lab.alone(**LOW).token_ids
    assert report_of(events["low"]).preemptions == 2


def test_nobody_makes_room_more_than_so_often(lab: Lab) -> None:
    engine = tight_engine(lab, LOW, HIGH)
    engine.add(prioritized(lab, "low", "low", **LOW))
    events = steps_until_tokens(engine, "low", 5)
    number = 0
    for _ in range(MAX_STEPS):
        if "low" not in engine.states:
            break
        if len(engine.states) == 1 and engine.states["low"].seat is not None:
            number += 1
            engine.add(prioritized(lab, f"high {number}", "high", **HIGH))
        events += [event for event in engine.step() if event.sequence_id == "low"]
    assert number == MAX_PREEMPTIONS + 1
    assert tokens_of(events) == lab.alone(**LOW).token_ids
    assert report_of(events).preemptions == MAX_PREEMPTIONS
    engine.drain()


@pytest.mark.parametrize(("first", "second"), [("low", "low"), ("normal", "high")])
def test_only_low_makes_room_and_not_for_its_like(
    first: Priority, second: Priority, lab: Lab
) -> None:
    engine = tight_engine(lab, LOW, HIGH)
    engine.add(prioritized(lab, "first", first, **LOW))
    steps_until_tokens(engine, "first", 5)
    engine.add(prioritized(lab, "second", second, **HIGH))
    engine.drain()
    assert engine.stats().num_preemptions == {}
    assert_same(engine.recordings["first"], lab.alone(**LOW).recording)


@pytest.mark.parametrize("num_steps", [0, 1, 3, 5, 7])
def test_work_under_way_makes_room_at_any_step(num_steps: int, lab: Lab) -> None:
    """While its video is encoded or its prompt is prefilled too."""
    engine = tight_engine(lab, LOW, HIGH, vision_batch_frames=4, prefill_chunk_tokens=40)
    engine.add(prioritized(lab, "low", "low", **LOW))
    events: dict[str, list[TokenEvent]] = {"low": [], "high": []}
    for _ in range(num_steps):
        events["low"] += engine.step()
    engine.add(prioritized(lab, "high", "high", **HIGH))
    events["low"] += engine.step()
    assert engine.states["high"].seat is not None and engine.states["low"].seat is None
    for name, more in engine.drain().items():
        events[name] += more
    assert tokens_of(events["low"]) == lab.alone(**LOW).token_ids
    assert tokens_of(events["high"]) == lab.alone(**HIGH).token_ids
    assert counts(report_of(events["low"])) == counts(lab.alone(**LOW).report)
    assert sum(event.prompt_tokens is not None for event in events["low"]) == 1


def test_a_prefix_that_is_shared_stays_and_is_found_again(lab: Lab) -> None:
    """Its bytes are free for the taking, but room for a question is all that is needed."""
    others = [LOW | {"question": question, "max_tokens": 20} for question in ("How?", "What?")]
    seats = sum(lab.seat_bytes(**ask) for ask in others)
    engine = lab.engine(kv_cache_bytes=lab.prefix_bytes(**LOW) + seats)
    for number, ask in enumerate(others):
        engine.add(prioritized(lab, f"low {number}", "low", **ask))
    for number in range(2):
        steps_until_tokens(engine, f"low {number}", 3)
    high = prioritized(lab, "high", "high", **LOW)
    engine.add(high)
    engine.step()
    assert engine.states["high"].has_prefix_hit
    assert engine.stats().num_running == 2, "one of the two is enough"
    assert engine.states["low 1"].seat is None, "the younger one"
    events = engine.drain()
    assert report_of(events["high"]).cache == CacheReport(True, True)
    for number, ask in enumerate(others):
        assert_same(engine.recordings[f"low {number}"], lab.alone(**ask).recording)


def test_a_place_is_room_too(lab: Lab) -> None:
    engine = lab.engine(max_running_sequences=1)
    events = preempt(
        engine,
        prioritized(lab, "low", "low", **LOW),
        prioritized(lab, "high", "high", **HIGH),
        num_tokens=3,
    )
    assert report_of(events["low"]).preemptions == 1
    assert tokens_of(events["low"]) == lab.alone(**LOW).token_ids


def one_video_engine(lab: Lab, **config: Any) -> RecordingEngine:
    """With room for the features of one video of eight frames."""
    model = lab.model
    num_values = 8 * lab.tokens_per_frame * model.feature_size
    settings = {"feature_cache_bytes": num_values * model.dtype.itemsize, "vision_batch_frames": 1}
    return lab.engine(**settings, **config)


def test_features_are_room_too(lab: Lab) -> None:
    engine = one_video_engine(lab)
    engine.add(prioritized(lab, "low", "low", **LOW))
    engine.step()
    engine.add(prioritized(lab, "high", "high", **HIGH))
    engine.step()
    assert engine.states["high"].seat is not None and engine.states["low"].seat is None
    events = engine.drain()
    assert tokens_of(events["low"]) == lab.alone(**LOW).token_ids
    assert tokens_of(events["high"]) == lab.alone(**HIGH).token_ids


@pytest.mark.parametrize("shares_video", [True, False])
def test_of_two_only_those_go_whose_features_are_in_the_way(shares_video: bool, lab: Lab) -> None:
    engine = one_video_engine(lab)
    engine.add(prioritized(lab, "low 0", "low", **LOW))
    if not shares_video:
        steps_until_tokens(engine, "low 0", 2)
    second = LOW | {"question": "How?", "video": 1 if shares_video else 3}
    engine.add(prioritized(lab, "low 1", "low", **second))
    engine.step()
    engine.add(prioritized(lab, "high", "high", **HIGH))
    engine.step()
    have_gone = [engine.states[f"low {number}"].seat is None for number in range(2)]
    assert have_gone == [shares_video, True]
    engine.drain()


def test_what_is_under_way_for_both_is_kept_when_one_makes_room(lab: Lab) -> None:
    engine = lab.engine(max_running_sequences=1, vision_batch_frames=1)
    engine.add(prioritized(lab, "low", "low", **LOW))
    engine.step()
    prefix = engine.states["low"].held_prefix
    assert prefix.video is not None and not prefix.video.is_ready
    engine.add(prioritized(lab, "high", "high", **LOW | {"question": "How?"}))
    engine.step()
    assert engine.states["high"].prefix is prefix
    events = engine.drain()
    assert report_of(events["high"]).cache == CacheReport(True, True)
    assert tokens_of(events["low"]) == lab.alone(**LOW).token_ids


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_prefix_goes_for_the_one_that_needs_it_only_if_nobody_else_is_in_the_way(
    is_alone: bool, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When what is free is not in pieces that fit its seat."""
    engine = lab.engine()
    engine.run(prioritized(lab, "before", "low", **LOW))
    if not is_alone:
        engine.add(prioritized(lab, "other", "normal", **HIGH | {"max_tokens": 12}))
        steps_until_tokens(engine, "other", 1)
    with monkeypatch.context() as patched:
        patched.setattr(engine.backend, "open_seat", lambda prefix, layout: None)
        engine.add(prioritized(lab, "high", "high", **LOW))
        engine.step()
        assert engine.states["high"].seat is None
    events = engine.drain()
    assert report_of(events["high"]).cache.has_prefix_hit != is_alone
    assert tokens_of(events["high"]) == lab.alone(**LOW).token_ids


def test_who_made_room_can_be_aborted_while_it_waits(lab: Lab) -> None:
    engine = tight_engine(lab, LOW, HIGH)
    engine.add(prioritized(lab, "low", "low", **LOW))
    steps_until_tokens(engine, "low", 5)
    engine.add(prioritized(lab, "high", "high", **HIGH))
    engine.step()
    assert engine.abort("low")
    events = engine.drain()
    assert "low" not in events
    assert_same(engine.recordings["high"], lab.alone(**HIGH).recording)


def test_kept_sets_are_told_once_for_each_token(lab: Lab) -> None:
    def asked(name: str, priority: Priority) -> Sequence:
        sequence = prioritized(lab, name, priority, **LOW | POLICIES["gated"])
        sequence.wants_kept_sets = True
        return sequence

    alone = lab.engine().run(asked("low", "normal"))["low"]
    engine = tight_engine(lab, LOW, HIGH)
    events = preempt(
        engine, asked("low", "low"), prioritized(lab, "high", "high", **HIGH), num_tokens=5
    )["low"]
    assert report_of(events).preemptions == 1
    assert report_of(events).kept == report_of(alone).kept


@mixes_are_random(max_examples=6)
@given(data=st.data(), mix=mixes_of_priorities())
def test_random_mixes_of_priorities_equal_single_runs(
    data: st.DataObject, mix: Mix, lab: Lab
) -> None:
    assert_mix_equals_single_runs(data, mix, lab)
