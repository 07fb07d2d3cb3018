"""Priorities in an engine: which sequence goes first, and that no answer depends on it."""

from typing import Any, cast

import pytest

from dycoke_core.config import DEFAULT_PRIORITY, Priority
from dycoke_core.errors import InvalidRequestError
from dycoke_core.precedence import MAX_OVERTAKES
from dycoke_core.sequence import ChatMessage, Sequence
from tests.engine.lab import Lab
from tests.engine.making_room import prioritized
from tests.engine.recording import MAX_STEPS, RecordingEngine, assert_same


def encoded(engine: RecordingEngine, name: str) -> bool:
    prefix = engine.states[name].prefix
    return prefix is not None and prefix.is_embedded


def test_a_priority_that_does_not_exist_is_refused() -> None:
    messages = (ChatMessage("user", "How?"),)
    assert Sequence("a", messages, None).priority == DEFAULT_PRIORITY
    with pytest.raises(InvalidRequestError, match="priority must be one of: high, normal, low"):
        Sequence("a", messages, None, priority=cast("Priority", "urgent"))


def test_answers_do_not_depend_on_priorities(lab: Lab) -> None:
    asks: dict[str, tuple[Priority, dict[str, Any]]] = {
        "low": ("low", {"video": 1}),
        "normal": ("normal", {"video": 2, "temperature": 0.8, "seed": 3}),
        "high": ("high", {"video": 3, "compression": "full"}),
        "late": ("high", {"video": 1, "question": "How?"}),
    }
    engine = lab.engine(prefill_chunk_tokens=9, max_running_sequences=3)
    engine.run(*(prioritized(lab, name, each, **ask) for name, (each, ask) in asks.items()))
    for name, (_, ask) in asks.items():
        assert_same(engine.recordings[name], lab.alone(**ask).recording)


def test_the_tower_encodes_better_priorities_first(lab: Lab) -> None:
    engine = lab.engine(vision_batch_frames=1)
    engine.add(prioritized(lab, "low", "low", video=1, num_frames=3))
    engine.step()
    engine.add(prioritized(lab, "high", "high", video=2, num_frames=2))
    for _ in range(MAX_STEPS):
        if encoded(engine, "high"):
            break
        engine.step()
    assert not encoded(engine, "low")


def test_the_tower_never_starves_low(lab: Lab) -> None:
    """While there is always a video of high priority to encode."""
    engine = lab.engine(vision_batch_frames=1)
    num_frames, num_added = 2, 0
    engine.add(prioritized(lab, "low", "low", video=1, num_frames=num_frames))
    for _ in range(MAX_STEPS):
        if encoded(engine, "low"):
            break
        if all(encoded(engine, name) for name in engine.states if name != "low"):
            num_added += 1
            ask = {"video": num_added + 1, "num_frames": 1, "max_tokens": 1}
            engine.add(prioritized(lab, f"{num_added}", "high", **ask))
        engine.step()
    assert MAX_OVERTAKES <= num_added <= (num_frames + 1) * (MAX_OVERTAKES + 1)
