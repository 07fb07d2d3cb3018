"""Read once, ask many: hits equal cold runs, work is shared, memory is bounded and given back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dycoke_core.config import EngineConfig
from dycoke_core.engine.backends.cpu.backend import CpuBackend
from dycoke_core.engine.budget import row_bytes
from dycoke_core.engine.prefix_cache import ByteBudget, Prefix, SharedPool, distinct_frames
from dycoke_core.errors import PromptTooLongError
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import CacheReport, ChatMessage, Sequence
from tests.engine.recording import (
    Recording,
    RecordingEngine,
    assert_same_kept,
    assert_same_logits,
    make_sequence,
    moving_square,
    report_of,
)

QUESTIONS = ("Describe the video.", "What color is the circle?", "How many?")


def run_alone(model: LlavaOnevision, sequence: Sequence) -> Recording:
    engine = RecordingEngine(model, EngineConfig())
    engine.run(sequence)
    return engine.recordings[sequence.sequence_id]


def assert_same(actual: Recording, expected: Recording) -> None:
    assert_same_logits(actual.logits, expected.logits)
    assert_same_kept(actual.kept, expected.kept)
    assert actual.refreshes == expected.refreshes


@pytest.mark.parametrize("compression", ["full", "dycoke"])
def test_a_prefix_hit_equals_a_cold_run(compression: str, tiny_model: LlavaOnevision) -> None:
    engine = RecordingEngine(tiny_model, EngineConfig())
    engine.run(make_sequence("first", compression=compression, question=QUESTIONS[0]))
    second = make_sequence("second", compression=compression, question=QUESTIONS[1])
    report = report_of(engine.run(second)["second"])
    assert report.cache == CacheReport(has_features_hit=True, has_prefix_hit=True)
    assert report.timings.vision_s == 0
    cold = make_sequence("second", compression=compression, question=QUESTIONS[1])
    assert_same(engine.recordings["second"], run_alone(tiny_model, cold))


def test_another_compression_finds_the_features_alone(engine: RecordingEngine) -> None:
    engine.run(make_sequence("full", compression="full"))
    report = report_of(engine.run(make_sequence("dycoke"))["dycoke"])
    assert report.cache == CacheReport(has_features_hit=True, has_prefix_hit=False)
    assert report.timings.vision_s < report.timings.prefill_s


@pytest.mark.parametrize(
    "changes",
    [
        {"video": 2},
        {"num_frames": 7},
        {"compression": {"policy": "dycoke", "k": 0.5}},
        {"compression": {"policy": "dycoke", "variant": "released"}},
    ],
)
def test_what_changes_the_prefix_changes_its_key(
    changes: dict[str, object], tiny_model: LlavaOnevision
) -> None:
    engine = RecordingEngine(tiny_model, EngineConfig())
    engine.run(make_sequence("first"))
    second = make_sequence("second", **changes)  # type: ignore[arg-type]
    report = report_of(engine.run(second)["second"])
    assert not report.cache.has_prefix_hit
    cold = make_sequence("second", **changes)  # type: ignore[arg-type]
    assert_same(engine.recordings["second"], run_alone(tiny_model, cold))


def test_stage_two_parameters_share_a_prefix(engine: RecordingEngine) -> None:
    engine.run(make_sequence("first"))
    other = {"policy": "dycoke", "p": 0.9, "l": 1, "threshold": 0.5}
    report = report_of(engine.run(make_sequence("second", compression=other))["second"])
    assert report.cache.has_prefix_hit


def test_a_system_message_makes_another_prefix(engine: RecordingEngine) -> None:
    engine.run(make_sequence("first"))
    second = make_sequence("second")
    second.messages = (ChatMessage("system", "Be brief."), *second.messages)
    report = report_of(engine.run(second)["second"])
    assert report.cache == CacheReport(has_features_hit=True, has_prefix_hit=False)


def test_questions_at_once_about_a_new_video_do_its_work_once(
    tiny_model: LlavaOnevision, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_encoded, num_rows = 0, 0
    encode, forward = LlavaOnevision.encode_frames, LlavaOnevision.forward

    def count_frames(model, frames):  # type: ignore[no-untyped-def]
        nonlocal num_encoded
        num_encoded += len(frames)
        return encode(model, frames)

    def count_rows(model, embeds, positions, attention):  # type: ignore[no-untyped-def]
        nonlocal num_rows
        num_rows += len(embeds)
        return forward(model, embeds, positions, attention)

    monkeypatch.setattr(LlavaOnevision, "encode_frames", count_frames)
    monkeypatch.setattr(LlavaOnevision, "forward", count_rows)
    engine = RecordingEngine(tiny_model, EngineConfig())
    questions = [make_sequence(str(n), question=QUESTIONS[n], max_tokens=5) for n in range(3)]
    reports = [report_of(events) for events in engine.run(*questions).values()]
    assert num_encoded == 8
    prompt = tiny_model.prompt_encoder(questions[0].messages)
    num_prefix = len(prompt.ids_before_video) + reports[0].compression.visual_tokens_prefill + 1
    own = [report.prompt_tokens - num_prefix for report in reports]
    assert num_rows == num_prefix + sum(own) + 3 * 4
    monkeypatch.undo()
    for sequence in questions:
        name = sequence.sequence_id
        cold = make_sequence(name, question=QUESTIONS[int(name)], max_tokens=5)
        assert_same(engine.recordings[name], run_alone(tiny_model, cold))


def test_frames_that_repeat_are_encoded_once(tiny_model: LlavaOnevision) -> None:
    frames = moving_square(1, num_frames=6)
    frames[1] = frames[0]
    frames[4] = frames[3]
    assert distinct_frames(frames) == ((0, 2, 3, 5), (0, 0, 1, 2, 2, 3))
    still = make_sequence("still")
    still.frames = frames
    engine = RecordingEngine(tiny_model, EngineConfig(vision_batch_frames=6))
    engine.run(still)

    *_, features = tiny_model.encode_frames(torch.from_numpy(frames))
    video = next(iter(engine.admission._videos._items.values()))
    assert video.features is not None and len(video.features) == 4
    torch.testing.assert_close(video.features[list(video.sources)], features)


def test_a_repeated_frame_is_one_that_equals_the_frame_before() -> None:
    frames = np.zeros((4, 2, 2, 3), np.uint8)
    frames[1] = 1
    assert distinct_frames(frames) == ((0, 1, 2), (0, 1, 2, 2))


def make_small_engine(model: LlavaOnevision, num_videos: float) -> RecordingEngine:
    """An engine with room for so many prefixes of 8 frames at full tokens."""
    row = model.text_geometry.num_layers * row_bytes(model.text_geometry, torch.float32)
    return RecordingEngine(model, EngineConfig(kv_cache_bytes=int(num_videos * 500 * row)))


def test_a_full_cache_evicts_the_least_recently_used(tiny_model: LlavaOnevision) -> None:
    engine = make_small_engine(tiny_model, 2.2)  # two prefixes of 399 tokens and one sequence's own
    ask = {"compression": "full", "max_tokens": 4}

    def is_hit(video: int) -> bool:
        events = engine.run(make_sequence(f"{video}", video=video, **ask))[f"{video}"]  # type: ignore[arg-type]
        return report_of(events).cache.has_prefix_hit

    hits = [video for video in (1, 2, 1, 3, 1, 2) if is_hit(video)]
    assert hits == [1, 1], "3 evicts 2, which had not been used for longer"


def test_sequences_wait_for_room_and_are_all_served(tiny_model: LlavaOnevision) -> None:
    engine = make_small_engine(tiny_model, 1.2)
    sequences = [
        make_sequence(str(video), video=video, compression="full", max_tokens=4)
        for video in range(4)
    ]
    for sequence in sequences:
        engine.add(sequence)
    engine.step()
    assert (engine.stats().num_running, engine.stats().num_waiting) == (1, 3)
    events = engine.drain()
    assert len(events) == 4
    for sequence in sequences:
        name = sequence.sequence_id
        cold = make_sequence(name, video=int(name), compression="full", max_tokens=4)
        assert_same(engine.recordings[name], run_alone(tiny_model, cold))


def test_what_can_never_fit_is_refused_at_once(tiny_model: LlavaOnevision) -> None:
    engine = make_small_engine(tiny_model, 0.5)
    with pytest.raises(PromptTooLongError, match="memory"):
        engine.add(make_sequence(compression="full"))


def test_a_reservation_covers_what_is_allocated(tiny_model: LlavaOnevision) -> None:
    for compression in ("full", "dycoke", {"policy": "dycoke", "l": 0, "p": 0.1}):
        engine = RecordingEngine(tiny_model, EngineConfig())
        engine.add(make_sequence(compression=compression, max_tokens=9))
        while not engine.states["a"].sequence.output_token_ids:
            engine.step()
        assert engine.backend.allocated_bytes() == engine.stats().kv_bytes_in_use
        engine.abort("a")


@pytest.mark.parametrize("layer", [0, 3])
def test_a_dp_cache_in_host_memory_changes_bytes_and_no_logit(
    layer: int, tiny_model: LlavaOnevision
) -> None:
    compression = {"policy": "dycoke", "l": layer, "threshold": 0.1}
    in_use = {}
    engines = {}
    for place in ("device", "host"):
        engine = RecordingEngine(tiny_model, EngineConfig(dp_cache=place))  # type: ignore[arg-type]
        engine.run(make_sequence("first", compression=compression))
        engine.add(make_sequence("second", compression=compression, question=QUESTIONS[1]))
        for _ in range(3):
            engine.step()
        in_use[place] = engine.stats().kv_bytes_in_use
        engine.drain()
        engines[place] = engine
    for name in ("first", "second"):
        assert_same(engines["host"].recordings[name], engines["device"].recordings[name])
    row = row_bytes(tiny_model.text_geometry, torch.float32)
    num_text = len(tiny_model.prompt_encoder((ChatMessage("user", "?"),)).ids_before_video)
    num_prefix = 49 * 2 + 14 * 6 + num_text + 1  # visual tokens, text before, newline
    moved_bytes = (6 - max(layer, 1)) * num_prefix * row  # the scoring layer stays
    assert in_use["device"] - in_use["host"] == moved_bytes
    assert engines["host"].admission.host_budget.used_bytes == moved_bytes
    engines["host"].clear_caches()
    assert engines["host"].admission.host_budget.used_bytes == 0


def test_a_prefix_stays_on_the_device_where_the_host_cannot_pin_memory(
    tiny_model: LlavaOnevision, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = RecordingEngine(tiny_model, EngineConfig(dp_cache="host"))
    expected.run(make_sequence())

    finish = CpuBackend.finish_prefix

    def refuse(backend: CpuBackend, prefix: int, *, to_host: bool) -> None:
        if to_host:
            raise RuntimeError("CUDA error: out of memory")
        finish(backend, prefix, to_host=to_host)

    monkeypatch.setattr(CpuBackend, "finish_prefix", refuse)
    engine = RecordingEngine(tiny_model, EngineConfig(dp_cache="host"))
    engine.run(make_sequence())
    assert_same(engine.recordings["a"], expected.recordings["a"])
    assert engine.admission.host_budget.used_bytes == 0
    assert engine.stats().kv_bytes_cached > expected.stats().kv_bytes_cached
    assert engine.admission.leaked_bytes == 0


def test_host_memory_is_bounded_too(tiny_model: LlavaOnevision) -> None:
    config = EngineConfig(dp_cache="host", host_cache_bytes=800_000)  # room for two prefixes
    engine = RecordingEngine(tiny_model, config)
    for video in range(6):
        engine.run(make_sequence(str(video), video=video, max_tokens=2))
        assert engine.admission.host_budget.used_bytes <= 800_000
    assert engine.admission.host_budget.used_bytes > 400_000


def test_want_of_host_memory_evicts_nothing_that_lies_on_the_device(
    tiny_model: LlavaOnevision,
) -> None:
    config = EngineConfig(dp_cache="host", host_cache_bytes=800_000)
    engine = RecordingEngine(tiny_model, config)
    engine.run(make_sequence("whole", video=9, compression="full", max_tokens=2))
    for video in range(4):
        engine.run(make_sequence(str(video), video=video, max_tokens=2))
    report = report_of(engine.run(make_sequence("again", video=9, compression="full"))["again"])
    assert report.cache.has_prefix_hit


def test_what_was_let_go_last_is_evicted_last() -> None:
    pool: SharedPool[Prefix] = SharedPool(ByteBudget(100))
    first, second = (Prefix(name, n, 9, None, 50, num_run=9) for n, name in enumerate("ab"))
    pool.add(first)
    pool.add(second)
    pool.release(second)
    pool.release(first)
    pool.make_room(50)
    assert pool.hold("a") is first
    assert pool.hold("b") is None


def test_an_engine_that_ran_out_of_memory_gives_up_what_nobody_uses(
    tiny_model: LlavaOnevision, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = RecordingEngine(tiny_model, EngineConfig())
    engine.run(make_sequence("before", video=1))
    assert engine.stats().kv_bytes_cached > 0

    def refuse(prefix: int, embeds: torch.Tensor, positions: torch.Tensor) -> None:
        raise MemoryError

    monkeypatch.setattr(engine.backend, "embed_prefix", refuse)
    engine.run(make_sequence("fails", video=2))
    assert engine.stats().kv_bytes_cached == 0
    monkeypatch.undo()
    assert report_of(engine.run(make_sequence("after", video=2))["after"])


def test_a_sequence_that_waits_evicts_nothing(tiny_model: LlavaOnevision) -> None:
    engine = make_small_engine(tiny_model, 1.7)
    ask = {"compression": "full", "num_frames": 2, "max_tokens": 40}
    engine.run(make_sequence("cached", video=1, **ask))  # type: ignore[arg-type]
    cached_bytes = engine.stats().kv_bytes_cached
    engine.add(make_sequence("runs", video=2, compression="full", max_tokens=100))
    engine.step()
    engine.add(make_sequence("waits", video=3, compression="full"))
    engine.step()
    assert engine.stats().num_waiting == 1
    assert engine.stats().kv_bytes_cached == cached_bytes


def test_what_is_reused_costs_no_flops(engine: RecordingEngine) -> None:
    cold = report_of(engine.run(make_sequence("cold"))["cold"]).compression
    hit = report_of(engine.run(make_sequence("hit"))["hit"]).compression
    assert hit.exact_flops_full == cold.exact_flops_full
    assert hit.exact_flops_actual < 0.2 * cold.exact_flops_actual


def test_work_under_way_is_dropped_with_its_last_holder(tiny_model: LlavaOnevision) -> None:
    engine = RecordingEngine(tiny_model, EngineConfig())
    engine.add(make_sequence("one", num_frames=16))
    engine.add(make_sequence("two", num_frames=16))
    engine.step()
    engine.abort("one")
    assert engine.stats().kv_bytes_in_use > 0, "the other still needs the video"
    engine.abort("two")
    assert engine.stats().kv_bytes_in_use == engine.stats().kv_bytes_cached == 0
    report = report_of(engine.run(make_sequence("three", num_frames=16))["three"])
    assert not report.cache.has_features_hit


REFERENCES: dict[tuple[object, ...], Recording] = {}
SHAPES = st.tuples(
    st.integers(1, 2),  # video
    st.sampled_from([1, 5, 8]),  # frames
    st.sampled_from(QUESTIONS),
    st.sampled_from(["full", "dycoke", "late"]),
    st.sampled_from([1, 4, 9]),  # max_tokens
    st.sampled_from([0.0, 0.8]),  # temperature
)


def make_random(name: str, shape: tuple[object, ...]) -> Sequence:
    video, num_frames, question, policy, max_tokens, temperature = shape
    late = {"policy": "dycoke", "l": 5, "threshold": 0.1}
    return make_sequence(
        name,
        video=video,  # type: ignore[arg-type]
        num_frames=num_frames,  # type: ignore[arg-type]
        question=question,  # type: ignore[arg-type]
        compression=late if policy == "late" else policy,  # type: ignore[arg-type]
        max_tokens=max_tokens,  # type: ignore[arg-type]
        temperature=temperature,
        seed=11,
    )


@settings(deadline=None, max_examples=25)
@given(data=st.data(), shapes=st.lists(SHAPES, min_size=1, max_size=8), room=st.floats(1.2, 5))
def test_random_mixes_equal_single_runs(
    data: st.DataObject, shapes: list[tuple[object, ...]], room: float, tiny_model: LlavaOnevision
) -> None:
    """Arrivals, aborts, hits and evictions at any step change no token of any other sequence."""
    engine = make_small_engine(tiny_model, room)
    arriving = [make_random(str(index), shape) for index, shape in enumerate(shapes)]
    aborted = set()
    while arriving or engine.has_work:
        if arriving and (not engine.has_work or data.draw(st.booleans())):
            engine.add(arriving.pop(0))
        if engine.has_work and data.draw(st.integers(0, 14)) == 0:
            victim = data.draw(st.sampled_from(sorted(engine.states)))
            engine.abort(victim)
            aborted.add(victim)
        engine.step()
    assert engine.stats().kv_bytes_in_use == 0
    for index, shape in enumerate(shapes):
        if str(index) not in aborted:
            if shape not in REFERENCES:
                REFERENCES[shape] = run_alone(tiny_model, make_random("alone", shape))
            assert_same(engine.recordings[str(index)], REFERENCES[shape])


@pytest.mark.slow
def test_thousands_of_short_sequences_leave_nothing_behind(tiny_model: LlavaOnevision) -> None:
    engine = make_small_engine(tiny_model, 3)
    rng = np.random.default_rng(0)
    clips = {video: moving_square(video, num_frames=1) for video in range(20)}
    for index in range(2000):
        sequence = make_sequence(str(index), num_frames=1, max_tokens=2)
        video = int(rng.integers(20))
        sequence.frames, sequence.video_key = clips[video], str(video)
        engine.add(sequence)
        if rng.random() < 0.05:
            engine.abort(str(index))
        if engine.stats().num_waiting > 8:
            engine.step()
        engine.recordings.clear()
    engine.drain()
    assert engine.stats().kv_bytes_in_use == 0
    engine.clear_caches()
    assert engine.stats().kv_bytes_cached == 0
