"""Random mixes: whatever comes, goes, is shared, evicted or preempted at whichever step, no answer
depends on it."""

from typing import Any, NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from dycoke_core.config import PRIORITIES, Priority
from dycoke_core.engine.preemption import MAX_PREEMPTIONS
from dycoke_core.sequence import TokenEvent
from tests.engine.bench import Bench, check_idle
from tests.engine.making_room import prioritized, tokens_of
from tests.engine.recording import MAX_STEPS, assert_same, report_of

Strategy = st.SearchStrategy[Any]

POLICIES: dict[str, Any] = {
    "full": "full",
    "default": "dycoke",
    "last layer": {"policy": "dycoke", "l": -1, "threshold": 0.1},
    "layer 0": {"policy": "dycoke", "l": 0, "threshold": 0.1},
    "layer 1": {"policy": "dycoke", "l": 1, "p": 0.9},
    "random": {"policy": "random_kv", "seed": 3},
}
ASKS = {
    "video": st.integers(1, 2),
    "num_frames": st.sampled_from([1, 5, 8]),
    "question": st.sampled_from(["Describe the video.", "What color is the circle?", "How?"]),
    "compression": st.sampled_from(list(POLICIES)),
    "max_tokens": st.sampled_from([1, 4, 9]),
    "temperature": st.sampled_from([0.0, 0.8]),
    "num_published": st.sampled_from([0, 0, 0, 3]),  # by an attempt before
}
LARGEST: dict[str, Any] = {"num_frames": 8, "compression": "full", "max_tokens": 9}
CONFIGS = st.fixed_dictionaries(
    {
        "dp_cache": st.sampled_from(["device", "host"]),
        "prefill_chunk_tokens": st.sampled_from([9, 4096]),
        "max_running_sequences": st.sampled_from([2, 3, 8]),
    }
)


def mixes_are_random(max_examples: int) -> Any:
    return settings(
        deadline=None,
        max_examples=max_examples,
        derandomize=True,
        # A bench keeps only answers.
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


class Mix(NamedTuple):
    """
    Args:
        room: bytes for KV, as a multiple of what the largest sequence needs.
    """

    asks: list[tuple[dict[str, Any], Priority]]
    room: float
    config: dict[str, Any]


def mixes(*, max_size: int = 8, **of_family: Strategy) -> st.SearchStrategy[Mix]:
    """Of sequences of one priority."""
    ask = st.tuples(st.fixed_dictionaries({**ASKS, **of_family}), st.just("normal"))
    asks = st.lists(ask, min_size=1, max_size=max_size)
    return st.builds(Mix, asks, st.floats(1.2, 5), CONFIGS)


def mixes_of_priorities(*, max_size: int = 8, **of_family: Strategy) -> st.SearchStrategy[Mix]:
    """In little room."""
    ask = st.tuples(st.fixed_dictionaries({**ASKS, **of_family}), st.sampled_from(PRIORITIES))
    asks = st.lists(ask, min_size=2, max_size=max_size)
    return st.builds(Mix, asks, st.floats(1, 2), CONFIGS)


def assert_mix_equals_single_runs(
    data: st.DataObject, mix: Mix, bench: Bench[Any], **largest: Any
) -> None:
    """
    Args:
        data: decides when sequences come, and which are aborted.
        largest: what else the largest sequence of a mix is asked.
    """
    asks = [(resolved(ask, bench), priority) for ask, priority in mix.asks]
    largest = {**LARGEST, **largest}
    sizes = [bench.sequence_bytes(ask, **mix.config) for ask in (largest, *(a for a, _ in asks))]
    engine = bench.engine(kv_cache_bytes=int(mix.room * max(sizes)), **mix.config)
    arriving = list(enumerate(asks))
    events: dict[str, list[TokenEvent]] = {str(index): [] for index in range(len(asks))}
    aborted = set()
    for _ in range(MAX_STEPS):
        if not arriving and not engine.has_work:
            break
        if arriving and (not engine.has_work or data.draw(st.booleans())):
            index, (ask, priority) = arriving.pop(0)
            engine.add(prioritized(bench, str(index), priority, **ask))
        if engine.states and data.draw(st.integers(0, 14)) == 0:
            gone = data.draw(st.sampled_from(sorted(engine.states)))
            engine.abort(gone)
            aborted.add(gone)
        for event in engine.step():
            events[event.sequence_id].append(event)
        assert engine.stats().kv_bytes_in_use <= engine.stats().kv_bytes_budget
        if bench.backend == "cuda":
            assert engine.backend.allocated_bytes() == engine.admission.kv_budget.used_bytes
    assert engine.stats().kv_bytes_in_use == 0
    check_idle(engine)
    for index, (ask, _) in enumerate(asks):
        if str(index) in aborted:
            continue
        alone, num_forced = bench.alone(**ask), len(ask.get("forced", ()))
        own = events[str(index)]
        assert tokens_of(own, first=num_forced) == alone.token_ids[num_forced:]
        assert report_of(own).preemptions <= MAX_PREEMPTIONS
        assert_same(engine.recordings[str(index)], alone.recording)
    bench.check()


def resolved(ask: dict[str, Any], bench: Bench[Any]) -> dict[str, Any]:
    policy = POLICIES[ask["compression"]]
    if isinstance(policy, dict) and "l" in policy:
        policy = {**policy, "l": policy["l"] % bench.num_layers}
    resolved = {**ask, "compression": policy, "seed": 11}
    num_published = resolved.pop("num_published")
    if num_published:
        published = bench.alone(**resolved).token_ids[:num_published]
        resolved["forced"] = tuple(published)
    return resolved
