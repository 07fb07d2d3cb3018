"""Whatever comes, goes, is shared or evicted at whichever step: no answer depends on it."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.lab import Lab, check_idle
from tests.engine.recording import MAX_STEPS, assert_same

POLICIES: dict[str, Any] = {
    "full": "full",
    "default": "dycoke",
    "last layer": {"policy": "dycoke", "l": -1, "threshold": 0.1},
    "layer 0": {"policy": "dycoke", "l": 0, "threshold": 0.1},
    "layer 1": {"policy": "dycoke", "l": 1, "p": 0.9},
    "random": {"policy": "random_kv", "seed": 3},
}
ASKS = st.fixed_dictionaries(
    {
        "video": st.integers(1, 2),
        "num_frames": st.sampled_from([1, 5, 8]),
        "question": st.sampled_from(["Describe the video.", "What color is the circle?", "How?"]),
        "compression": st.sampled_from(list(POLICIES)),
        "max_tokens": st.sampled_from([1, 4, 9]),
        "temperature": st.sampled_from([0.0, 0.8]),
        "num_published": st.sampled_from([0, 0, 0, 3]),  # by an attempt before
    }
)
SETTINGS = st.fixed_dictionaries(
    {
        "dp_cache": st.sampled_from(["device", "host"]),
        "prefill_chunk_tokens": st.sampled_from([9, 4096]),
        "max_running_sequences": st.sampled_from([2, 3, 8]),
    }
)


@settings(
    deadline=None,
    max_examples=12,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # a lab keeps nothing but answers
)
@given(
    data=st.data(),
    asks=st.lists(ASKS, min_size=1, max_size=8),
    room=st.floats(1.2, 5),
    config=SETTINGS,
)
def test_random_mixes_equal_single_runs(
    data: st.DataObject,
    asks: list[dict[str, Any]],
    room: float,
    config: dict[str, Any],
    lab: Lab,
) -> None:
    asks = [resolved(ask, lab) for ask in asks]
    largest = {"compression": "full", "max_tokens": 9}
    kv_bytes = lab.prefix_bytes(**largest) + lab.seat_bytes(**largest)
    engine = lab.engine(kv_cache_bytes=int(room * kv_bytes), **config)
    arriving = list(enumerate(asks))
    aborted = set()
    for _ in range(MAX_STEPS):
        if not arriving and not engine.has_work:
            break
        if arriving and (not engine.has_work or data.draw(st.booleans())):
            index, ask = arriving.pop(0)
            engine.add(lab.sequence(str(index), **ask))
        if engine.states and data.draw(st.integers(0, 14)) == 0:
            victim = data.draw(st.sampled_from(sorted(engine.states)))
            engine.abort(victim)
            aborted.add(victim)
        engine.step()
        if lab.backend == "cuda":
            assert engine.backend.allocated_bytes() == engine.admission.kv_budget.used_bytes
    assert engine.stats().kv_bytes_in_use == 0
    check_idle(engine)
    for index, ask in enumerate(asks):
        if str(index) not in aborted:
            assert_same(engine.recordings[str(index)], lab.alone(**ask).recording)
    lab.check()


def resolved(ask: dict[str, Any], lab: Lab) -> dict[str, Any]:
    policy = POLICIES[ask["compression"]]
    if isinstance(policy, dict) and "l" in policy:
        policy = {**policy, "l": policy["l"] % lab.num_layers}
    resolved = {**ask, "compression": policy, "seed": 11}
    num_published = resolved.pop("num_published")
    if num_published:
        published = lab.alone(**resolved).token_ids[:num_published]
        resolved["forced"] = tuple(published)
    return resolved
