"""Sequences that make room for better priorities, in engines with room for few."""

from typing import Any

from dycoke_core.config import Priority
from dycoke_core.sequence import Sequence, TokenEvent
from tests.engine.bench import Bench
from tests.engine.recording import MAX_STEPS, RecordingEngine, steps_until_tokens

LOW: dict[str, Any] = {"video": 1, "max_tokens": 12}
HIGH: dict[str, Any] = {"video": 2, "max_tokens": 3, "compression": "full"}


def prioritized(bench: Bench[Any], name: str, priority: Priority, **ask: Any) -> Sequence:
    sequence = bench.sequence(name, **ask)
    sequence.priority = priority
    return sequence


def tight_engine(bench: Bench[Any], *asks: dict[str, Any], **config: Any) -> RecordingEngine:
    """With room for the largest of what is asked, and little more."""
    largest = max(bench.sequence_bytes(ask, **config) for ask in asks)
    return bench.engine(kv_cache_bytes=int(1.2 * largest), **config)


def high_of(bench: Bench[Any]) -> Sequence:
    return prioritized(bench, "high", "high", **HIGH)


def tokens_of(events: list[TokenEvent], *, first: int = 0) -> list[int]:
    """Asserts that none is missing or repeated."""
    ids: list[int] = []
    for event in events:
        assert event.index == first + len(ids)
        ids += event.token_ids
    return ids


def preempt(
    engine: RecordingEngine, low: Sequence, high: Sequence, *, num_tokens: int
) -> dict[str, list[TokenEvent]]:
    """Events of a sequence of low priority that makes room once it has this many tokens, and of the
    one of high priority that it makes room for."""
    engine.add(low)
    events = {
        low.sequence_id: steps_until_tokens(engine, low.sequence_id, num_tokens),
        high.sequence_id: [],
    }
    engine.add(high)
    for _ in range(MAX_STEPS):
        if not engine.has_work:
            return events
        for event in engine.step():
            events[event.sequence_id].append(event)
    raise AssertionError("sequences wait for what never comes")
