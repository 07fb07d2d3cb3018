"""The DP cache in host memory: other bytes, the same numbers."""

from typing import Any

import pytest

from dycoke_core.engine.backend import Backend
from tests.engine.lab import Lab
from tests.engine.recording import RecordingEngine, assert_same, report_of

QUESTIONS = ("Describe the video.", "What color is the circle?")


def with_layer(layer: int, **others: Any) -> dict[str, Any]:
    return {"compression": {"policy": "dycoke", "l": layer, "threshold": 0.1, **others}}


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_it_changes_bytes_and_no_logit(layer: int, lab: Lab) -> None:
    ask = with_layer(layer)
    engine = lab.engine(dp_cache="host")
    engine.run(lab.sequence("first", **ask))
    engine.run(lab.sequence("second", question=QUESTIONS[1], **ask))  # over a prefix that has moved
    assert_same(engine.recordings["first"], lab.alone(**ask).recording)
    again = lab.alone(question=QUESTIONS[1], **ask)
    assert_same(engine.recordings["second"], again.recording)

    prefix = engine.admission.prepare(lab.sequence(**ask)).layout.prefix
    assert prefix.first_host_layer == max(layer, 1), "the scoring layer stays"
    backend: Backend = engine.backend
    assert backend.moved_bytes(prefix) > 0
    left = backend.prefix_bytes(prefix) - backend.moved_bytes(prefix)
    assert engine.stats().kv_bytes_cached == left
    assert engine.admission.host_budget.used_bytes == backend.host_bytes(prefix)


def test_layers_0_and_1_share_a_prefix_there_and_others_do_not(lab: Lab) -> None:
    engine = lab.engine(dp_cache="host")
    for layer, is_hit in ((1, False), (0, True), (2, False), (3, False), (2, True)):
        name, ask = f"{layer} {is_hit}", with_layer(layer)
        report = report_of(engine.run(lab.sequence(name, **ask))[name])
        assert report.cache.has_prefix_hit == is_hit
        assert_same(engine.recordings[name], lab.alone(**ask).recording)


@pytest.mark.parametrize("chunk_tokens", [3, 4096])
def test_questions_about_videos_here_and_there_run_in_one_step(chunk_tokens: int, lab: Lab) -> None:
    """Some prefixes on the device, some in host memory from different layers on."""
    asks: list[dict[str, Any]] = [
        {"compression": "full"},
        with_layer(1),
        {**with_layer(3), "video": 2},
        {**with_layer(0), "question": QUESTIONS[1]},
        {"compression": {"policy": "vidcom2", "retained_ratio": 0}},
        {**with_layer(2, p=1.0), "video": 3},
    ]
    engine = lab.engine(dp_cache="host", prefill_chunk_tokens=chunk_tokens)
    engine.run(
        *(lab.sequence(f"before {n}", **{**ask, "max_tokens": 1}) for n, ask in enumerate(asks))
    )
    engine.run(*(lab.sequence(str(n), **ask) for n, ask in enumerate(asks)))
    for n, ask in enumerate(asks):
        assert_same(engine.recordings[str(n)], lab.alone(**ask).recording)


def test_who_joins_while_a_prefix_is_prefilled_reads_it_where_it_goes(lab: Lab) -> None:
    """Their seats are opened before it moves; a later one after it."""
    ask = with_layer(1)
    engine = lab.engine(dp_cache="host", prefill_chunk_tokens=8)
    engine.add(lab.sequence("first", **ask))
    while engine.states["first"].prefix is None or engine.states["first"].held_prefix.num_run < 16:
        engine.step()
    engine.add(lab.sequence("joins", question=QUESTIONS[1], **ask))
    while not engine.states["first"].sequence.output_token_ids:
        engine.step()
    engine.add(lab.sequence("late", max_tokens=5, **ask))
    engine.drain()
    assert_same(engine.recordings["first"], lab.alone(**ask).recording)
    assert_same(engine.recordings["joins"], lab.alone(question=QUESTIONS[1], **ask).recording)
    assert_same(engine.recordings["late"], lab.alone(max_tokens=5, **ask).recording)


def test_a_prefix_stays_on_the_device_where_the_host_cannot_pin_memory(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = lab.backend_class.finish_prefix

    def refuse(backend: Any, prefix: int, *, to_host: bool) -> None:
        if to_host:
            raise RuntimeError("CUDA error: out of memory")
        finish(backend, prefix, to_host=to_host)

    engine = lab.engine(dp_cache="host")
    with monkeypatch.context() as patches:
        patches.setattr(lab.backend_class, "finish_prefix", refuse)
        engine.run(lab.sequence())
    assert_same(engine.recordings["a"], lab.alone().recording)
    assert engine.admission.host_budget.used_bytes == 0
    assert engine.stats().kv_bytes_cached == lab.prefix_bytes()
    # The next question is asked over it, with rows set aside that it does not need.
    engine.run(lab.sequence("again", max_tokens=6))
    assert_same(engine.recordings["again"], lab.alone(max_tokens=6).recording)


def host_bytes(engine: RecordingEngine, lab: Lab) -> int:
    return engine.backend.host_bytes(engine.admission.prepare(lab.sequence()).layout.prefix)


def room_for(num_prefixes: int, lab: Lab) -> int:
    """A setting that leaves room for at least this many, whatever the backend rounds it to."""
    probe = lab.engine(dp_cache="host", host_cache_bytes=2**23)
    num_bytes = num_prefixes * host_bytes(probe, lab)
    if lab.backend == "cpu":
        return num_bytes
    unused = 2**23 - probe.backend.host_budget_bytes  # a page without an owner
    return 1 << (num_bytes + unused - 1).bit_length()


def test_host_memory_is_bounded_and_the_least_recently_used_makes_room(lab: Lab) -> None:
    engine = lab.engine(dp_cache="host", host_cache_bytes=room_for(5, lab))
    budget = engine.admission.host_budget
    for video in range(12):
        engine.run(lab.sequence(str(video), video=video, max_tokens=2))
        assert budget.used_bytes <= budget.max_bytes
    assert budget.max_bytes - budget.used_bytes < host_bytes(engine, lab)
    assert budget.used_bytes >= 5 * host_bytes(engine, lab)
    # All of those that are left lie there: the last ones.
    num_kept = budget.used_bytes // host_bytes(engine, lab)
    hits = []
    for video in reversed(range(12)):
        ask = {"video": video, "max_tokens": 2}
        events = engine.run(lab.sequence(f"again {video}", **ask))[f"again {video}"]
        hits.append(report_of(events).cache.has_prefix_hit)
        if len(hits) == num_kept:
            break
    assert all(hits)


def test_want_of_host_memory_evicts_nothing_that_lies_on_the_device(lab: Lab) -> None:
    engine = lab.engine(dp_cache="host", host_cache_bytes=room_for(5, lab))
    engine.run(lab.sequence("whole", video=11, compression="full", max_tokens=2))
    for video in range(10):
        engine.run(lab.sequence(str(video), video=video, max_tokens=2))
    report = report_of(engine.run(lab.sequence("again", video=11, compression="full"))["again"])
    assert report.cache.has_prefix_hit


@pytest.mark.parametrize("lab", ["cuda"], indirect=True)
def test_a_prefix_that_lies_in_the_way_of_its_only_question_goes(lab: Lab) -> None:
    """Where pages of several heights mix, bytes that suffice may come in pieces that do not."""
    ask = with_layer(3)
    page_bytes = lab.prefix_bytes(**ask)  # one, of all four layers
    assert lab.num_layers == 4 and lab.seat_bytes(**ask) == page_bytes
    # One page of all layers, five for the long answer, one of one layer for its kept rows.
    engine = lab.engine(dp_cache="host", kv_cache_bytes=25 * page_bytes // 4)
    # Three seats of five quarters each: when they go, the prefix lies at 19 to 22 of 25.
    engine.run(*(lab.sequence(str(n), max_tokens=3, **ask) for n in range(3)))
    assert engine.stats().kv_bytes_cached == 3 * page_bytes // 4
    long: dict[str, Any] = {"max_tokens": 300, **ask}
    engine.add(lab.sequence("long", **long))
    for _ in range(5):
        engine.step()
    assert engine.stats().num_running == 1
    engine.abort("long")
