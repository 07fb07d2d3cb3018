"""Sequences whose frames can be loaded again keep them only as long as the vision tower needs them.

Those that are preempted, and whose videos have to be encoded again, wait for them; nothing else
does, and no answer shows it.
"""

import gc
import logging
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dycoke_core.config import Priority
from dycoke_core.engine import executor
from dycoke_core.errors import InvalidRequestError
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import Sequence, Stage, TokenEvent
from tests.engine.lab import Lab
from tests.engine.making_room import HIGH, LOW, prioritized, tight_engine, tokens_of
from tests.engine.mixes import Mix, mixes_are_random, mixes_of_priorities, resolved
from tests.engine.recording import (
    MAX_STEPS,
    RecordingEngine,
    assert_same,
    counts,
    report_of,
    steps_until_tokens,
)
from tests.engine.test_making_room import POLICIES


def reloadable(lab: Lab, name: str, priority: Priority = "low", **ask: Any) -> Sequence:
    sequence = prioritized(lab, name, priority, **ask)
    sequence.can_reload_frames = True
    return sequence


def give_frames(engine: RecordingEngine, lab: Lab, name: str, **ask: Any) -> "weakref.ref[Any]":
    """As the sequence's owner would. Returns the array, if it still exists."""
    frames = lab.sequence(**ask).frames
    assert frames is not None and engine.give_frames(name, frames)
    return weakref.ref(frames)


def step_until_encoded(engine: RecordingEngine, name: str) -> list[TokenEvent]:
    events = []
    for _ in range(MAX_STEPS):
        prefix = engine.states[name].prefix
        if prefix is not None and prefix.is_embedded:
            return events
        events += engine.step()
    raise AssertionError("the video is never encoded")


def preempt_and_evict(
    engine: RecordingEngine, lab: Lab, low: Sequence, *, num_tokens: int
) -> list[TokenEvent]:
    """Runs a sequence of low priority until it has made room and waits for its frames, as what was
    made of its video is gone. Returns its events."""
    name = low.sequence_id
    engine.add(low)
    events = steps_until_tokens(engine, name, num_tokens)
    engine.add(prioritized(lab, "high", "high", **HIGH))
    events += [event for event in engine.step() if event.sequence_id == name]
    assert engine.states[name].seat is None
    engine.clear_caches()
    engine.drain()
    assert engine.waiting_for_frames == (name,)
    return events


@pytest.mark.parametrize("ask", [{}, {"compression": "full"}, {"num_frames": 1}])
def test_pixels_go_when_the_video_is_encoded(ask: dict[str, Any], lab: Lab) -> None:
    engine = lab.engine(vision_batch_frames=4)
    sequence = reloadable(lab, "a", **ask)
    pixels = weakref.ref(sequence.frames)
    engine.add(sequence)
    assert pixels() is not None
    events = step_until_encoded(engine, "a")
    gc.collect()
    assert pixels() is None and "a" in engine.states
    events += engine.drain()["a"]
    assert tokens_of(events) == lab.alone(**ask).token_ids
    assert counts(report_of(events)) == counts(lab.alone(**ask).report)


def test_pixels_go_at_once_where_the_video_is_known(lab: Lab) -> None:
    engine = lab.engine()
    engine.run(reloadable(lab, "first"))
    for ask in ({"question": "How?"}, {"compression": "full"}):
        sequence = reloadable(lab, "next", **ask)
        pixels = weakref.ref(sequence.frames)
        engine.add(sequence)
        engine.step()
        gc.collect()
        assert pixels() is None and "next" in engine.states
        engine.drain()
        assert_same(engine.recordings.pop("next"), lab.alone(**ask).recording)


def test_pixels_stay_where_nobody_can_bring_them_again(lab: Lab) -> None:
    engine = tight_engine(lab, LOW, HIGH)
    low = prioritized(lab, "low", "low", **LOW)
    engine.add(low)
    events = steps_until_tokens(engine, "low", 5)
    engine.add(prioritized(lab, "high", "high", **HIGH))
    events += [event for event in engine.step() if event.sequence_id == "low"]
    engine.clear_caches()
    events += engine.drain()["low"]
    assert low.frames is not None and report_of(events).preemptions == 1
    assert tokens_of(events) == lab.alone(**LOW).token_ids


@pytest.mark.parametrize(
    ("policy", "dp_cache"),
    [("full", "device"), ("drawn", "device"), ("gated", "device"), ("gated", "host")],
)
def test_an_answer_that_waited_for_its_frames_is_what_it_would_have_been(
    policy: str, dp_cache: str, lab: Lab
) -> None:
    ask = LOW | POLICIES[policy]
    engine = tight_engine(lab, ask, HIGH, dp_cache=dp_cache)
    low = reloadable(lab, "low", **ask)
    events = preempt_and_evict(engine, lab, low, num_tokens=5)
    assert low.stage is Stage.WAITING and not engine.has_work
    assert (engine.stats().num_waiting, engine.stats().num_running) == (1, 0)
    pixels = give_frames(engine, lab, "low", **ask)
    assert engine.waiting_for_frames == () and pixels() is not None
    events += step_until_encoded(engine, "low")
    gc.collect()
    assert pixels() is None
    events += engine.drain()["low"]
    assert tokens_of(events) == lab.alone(**ask).token_ids
    assert_same(engine.recordings["low"], lab.alone(**ask).recording)
    assert counts(report_of(events)) == counts(lab.alone(**ask).report)
    assert report_of(events).preemptions == 1


def test_tokens_of_an_earlier_attempt_are_replayed_from_frames_that_came_again(lab: Lab) -> None:
    whole = lab.alone(**LOW).token_ids
    engine = tight_engine(lab, LOW, HIGH)
    low = reloadable(lab, "low", **LOW, forced=tuple(whole[:3]))
    events = preempt_and_evict(engine, lab, low, num_tokens=6)
    give_frames(engine, lab, "low", **LOW)
    events += engine.drain()["low"]
    assert [token for event in events for token in event.token_ids] == whole[3:]


def test_features_or_a_prefix_that_are_still_there_need_no_frames(lab: Lab) -> None:
    engine = lab.engine(max_running_sequences=1)
    engine.add(reloadable(lab, "low", **LOW))
    events = steps_until_tokens(engine, "low", 3)
    for name, forget in (("prefix", lambda: None), ("features", engine.admission.clear_prefixes)):
        engine.add(prioritized(lab, name, "high", **HIGH))
        events += [event for event in engine.step() if event.sequence_id == "low"]
        assert engine.states["low"].seat is None
        forget()
        while name in engine.states or not engine.states["low"].sequence.output_token_ids:
            events += [event for event in engine.step() if event.sequence_id == "low"]
    events += engine.drain()["low"]
    assert tokens_of(events) == lab.alone(**LOW).token_ids
    assert report_of(events).preemptions == 2


@pytest.mark.parametrize("num_steps", [1, 2])
def test_frames_that_are_not_encoded_yet_are_kept_for_the_next_time(
    num_steps: int, lab: Lab
) -> None:
    engine = tight_engine(lab, LOW, HIGH, vision_batch_frames=4)
    low = reloadable(lab, "low", **LOW)
    engine.add(low)
    for _ in range(num_steps):
        engine.step()
    assert low.frames is None
    engine.add(prioritized(lab, "high", "high", **HIGH))
    engine.step()
    assert engine.states["low"].seat is None and low.frames is not None
    events = engine.drain()
    assert tokens_of(events["low"]) == lab.alone(**LOW).token_ids


def test_who_waits_for_frames_holds_up_nobody(lab: Lab) -> None:
    engine = tight_engine(lab, LOW, HIGH)
    events = preempt_and_evict(engine, lab, reloadable(lab, "low", **LOW), num_tokens=5)
    other = LOW | {"video": 3}
    run = engine.run(prioritized(lab, "younger", "low", **other))
    assert tokens_of(run["younger"]) == lab.alone(**other).token_ids
    assert engine.waiting_for_frames == ("low",) and set(run) == {"younger"}
    give_frames(engine, lab, "low", **LOW)
    events += engine.drain()["low"]
    assert tokens_of(events) == lab.alone(**LOW).token_ids


def test_another_question_about_the_video_brings_what_is_missing(lab: Lab) -> None:
    """Frames that were asked for may still be brought."""
    engine = tight_engine(lab, LOW, HIGH)
    events = preempt_and_evict(engine, lab, reloadable(lab, "low", **LOW), num_tokens=5)
    engine.run(reloadable(lab, "other", **LOW | {"question": "How?", "max_tokens": 2}))
    pixels = give_frames(engine, lab, "low", **LOW)
    events += engine.step()
    gc.collect()
    assert pixels() is None, "the prefix is there again"
    events += engine.drain()["low"]
    assert tokens_of(events) == lab.alone(**LOW).token_ids


def test_who_waits_for_frames_can_be_aborted(lab: Lab) -> None:
    engine = tight_engine(lab, LOW, HIGH)
    preempt_and_evict(engine, lab, reloadable(lab, "low", **LOW), num_tokens=5)
    assert engine.abort("low")
    assert engine.waiting_for_frames == () and not engine.states
    frames = lab.sequence(**LOW).frames
    assert frames is not None and not engine.give_frames("low", frames)


def test_frames_that_nobody_waits_for_are_not_taken(lab: Lab) -> None:
    engine = lab.engine()
    engine.add(reloadable(lab, "a"))
    frames = lab.sequence().frames
    assert frames is not None and not engine.give_frames("a", frames)
    engine.step()
    assert not engine.give_frames("a", frames)


def test_other_frames_than_it_had_are_refused_and_it_waits_on(lab: Lab) -> None:
    engine = tight_engine(lab, LOW, HIGH)
    events = preempt_and_evict(engine, lab, reloadable(lab, "low", **LOW), num_tokens=5)
    right = lab.sequence(**LOW).frames
    assert right is not None
    wrong = [right[:4], right.astype(np.int16), 255 - right]
    for frames in wrong:
        with pytest.raises(InvalidRequestError, match="not the frames"):
            engine.give_frames("low", frames)
        assert engine.waiting_for_frames == ("low",)
    give_frames(engine, lab, "low", **LOW)
    events += engine.drain()["low"]
    assert tokens_of(events) == lab.alone(**LOW).token_ids


def test_a_sequence_that_has_let_its_frames_go_is_no_conversation_without_a_video(
    lab: Lab,
) -> None:
    sequence = reloadable(lab, "a", max_tokens=2)
    engine = lab.engine()
    engine.run(sequence)
    assert sequence.frames is None
    with pytest.raises(InvalidRequestError, match="frames are missing"):
        engine.add(sequence)


def test_a_deleted_video_comes_again_for_who_was_there_before(lab: Lab) -> None:
    engine = lab.engine(max_running_sequences=1)
    low = reloadable(lab, "low", **LOW)
    low.video_name = "the video"
    engine.add(low)
    events = steps_until_tokens(engine, "low", 3)
    engine.forget_video("the video")
    engine.add(prioritized(lab, "high", "high", **HIGH))
    events += [event for event in engine.drain()["low"] if event.sequence_id == "low"]
    assert engine.waiting_for_frames == ("low",)
    give_frames(engine, lab, "low", **LOW)
    events += engine.drain()["low"]
    assert tokens_of(events) == lab.alone(**LOW).token_ids


def test_a_failed_batch_of_frames_is_tried_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Though the sequences have dropped their frames, and no pixels outlive them."""
    caplog.set_level(logging.ERROR, executor.__name__)  # pytest would keep the failure's traceback
    encode = LlavaOnevision.encode_frames

    def refuse_many(model: LlavaOnevision, frames: Tensor) -> Any:
        if len(frames) > 5:
            raise torch.OutOfMemoryError("no memory")
        return encode(model, frames)

    monkeypatch.setattr(LlavaOnevision, "encode_frames", refuse_many)
    asks = {str(video): {"video": video, "num_frames": 4} for video in (1, 2, 3)}
    sequences = [reloadable(lab, name, **ask) for name, ask in asks.items()]
    pixels = [weakref.ref(sequence.frames) for sequence in sequences]
    engine = lab.engine(vision_batch_frames=16)
    for sequence in sequences:
        engine.add(sequence)
    engine.step()
    assert engine.abort("3"), "while it waits to be tried alone"
    gc.collect()
    assert [ref() is None for ref in pixels] == [False, False, True]
    events = engine.drain()
    monkeypatch.undo()
    for name in ("1", "2"):
        assert tokens_of(events[name]) == lab.alone(**asks[name]).token_ids


@mixes_are_random(max_examples=6)
@given(
    data=st.data(),
    mix=mixes_of_priorities(),
    max_running=st.integers(1, 2),  # a place is room: most of low priority make some
)
def test_random_mixes_that_let_their_frames_go_equal_single_runs(
    data: st.DataObject, mix: Mix, max_running: int, lab: Lab
) -> None:
    """Caches are cleared and frames come at whichever step."""
    asks = [(resolved(ask, lab), priority) for ask, priority in mix.asks]
    engine = lab.engine(**mix.config | {"max_running_sequences": max_running})
    arriving = list(enumerate(asks))
    events: dict[str, list[TokenEvent]] = {str(index): [] for index in range(len(asks))}
    aborted = set()
    for _ in range(MAX_STEPS):
        if not arriving and not engine.states:
            break
        if arriving and (not engine.has_work or data.draw(st.booleans())):
            index, (ask, priority) = arriving.pop(0)
            engine.add(reloadable(lab, str(index), priority, **ask))
        waiting = engine.waiting_for_frames
        for name in [name for name in waiting if not engine.has_work or data.draw(st.booleans())]:
            give_frames(engine, lab, name, **asks[int(name)][0])
        if engine.states and data.draw(st.integers(0, 14)) == 0:
            gone = data.draw(st.sampled_from(sorted(engine.states)))
            engine.abort(gone)
            aborted.add(gone)
        if data.draw(st.booleans()):
            engine.clear_caches()
        for event in engine.step():
            events[event.sequence_id].append(event)
    assert not engine.states
    for index in sorted({*events} - aborted):
        assert_same(engine.recordings[index], lab.alone(**asks[int(index)][0]).recording)
