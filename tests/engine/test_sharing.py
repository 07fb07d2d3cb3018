"""Read once, ask many: hits equal cold runs, work is shared, memory is bounded and given back."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dycoke_core.engine.backend import StepPlan
from dycoke_core.errors import PromptTooLongError
from dycoke_core.frame_content import distinct_units
from dycoke_core.model.adapter import EmbeddedPrefix
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import CacheReport, ChatMessage
from tests.engine.lab import Lab
from tests.engine.recording import RecordingEngine, assert_same, moving_square, report_of

QUESTIONS = ("Describe the video.", "What color is the circle?", "How many?")
FULL: dict[str, Any] = {"compression": "full", "max_tokens": 4}


@pytest.mark.parametrize("compression", ["full", "dycoke"])
def test_a_prefix_hit_equals_a_cold_run(compression: str, lab: Lab) -> None:
    engine = lab.engine()
    engine.run(lab.sequence("first", compression=compression, question=QUESTIONS[0]))
    ask = {"compression": compression, "question": QUESTIONS[1]}
    report = report_of(engine.run(lab.sequence("second", **ask))["second"])
    assert report.cache == CacheReport(has_features_hit=True, has_prefix_hit=True)
    assert report.timings.vision_s == 0
    assert_same(engine.recordings["second"], lab.alone(**ask).recording)


def test_what_is_kept_of_a_video_has_no_pixels(lab: Lab) -> None:
    """They go with the sequence that has brought them; its features serve the next one."""
    engine = lab.engine()
    sequence = lab.sequence("first")
    pixels = weakref.ref(sequence.frames)
    engine.run(sequence)
    engine.recordings.clear()
    del sequence
    gc.collect()
    assert pixels() is None
    report = report_of(engine.run(lab.sequence("second"))["second"])
    assert report.cache.has_features_hit


def test_another_compression_finds_the_features_alone(lab: Lab) -> None:
    engine = lab.engine()
    engine.run(lab.sequence("full", compression="full"))
    report = report_of(engine.run(lab.sequence("dycoke"))["dycoke"])
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
    ids=str,
)
def test_what_changes_the_prefix_changes_its_key(changes: dict[str, object], lab: Lab) -> None:
    engine = lab.engine()
    engine.run(lab.sequence("first"))
    report = report_of(engine.run(lab.sequence("second", **changes))["second"])
    assert not report.cache.has_prefix_hit
    assert_same(engine.recordings["second"], lab.alone(**changes).recording)


def test_stage_two_parameters_share_a_prefix(lab: Lab) -> None:
    engine = lab.engine()
    engine.run(lab.sequence("first"))
    other = {"policy": "dycoke", "p": 0.9, "l": 1, "threshold": 0.5}
    report = report_of(engine.run(lab.sequence("second", compression=other))["second"])
    assert report.cache.has_prefix_hit
    assert_same(engine.recordings["second"], lab.alone(compression=other).recording)


def test_a_system_message_makes_another_prefix(lab: Lab) -> None:
    engine = lab.engine()
    engine.run(lab.sequence("first"))
    second = lab.sequence("second")
    second.messages = (ChatMessage("system", "Be brief."), *second.messages)
    report = report_of(engine.run(second)["second"])
    assert report.cache == CacheReport(has_features_hit=True, has_prefix_hit=False)


def test_questions_at_once_about_a_new_video_do_its_work_once(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = [{"question": question, "max_tokens": 5} for question in QUESTIONS]
    num_encoded, plans = 0, []
    encode, run = LlavaOnevision.encode_frames, lab.backend_class.run

    def count_frames(model: LlavaOnevision, frames: Tensor) -> Any:
        nonlocal num_encoded
        num_encoded += len(frames)
        return encode(model, frames)

    def note_plan(backend: Any, plan: StepPlan) -> Any:
        plans.append(plan)
        return run(backend, plan)

    engine = lab.engine()
    with monkeypatch.context() as patches:
        patches.setattr(LlavaOnevision, "encode_frames", count_frames)
        patches.setattr(lab.backend_class, "run", note_plan)
        events = engine.run(*(lab.sequence(str(n), **ask) for n, ask in enumerate(asks)))
    reports = [report_of(events[str(n)]) for n in range(3)]
    assert num_encoded == 8
    num_prefix = lab.layout(**asks[0]).prefix.num_tokens
    assert sum(chunk.size for plan in plans for chunk in plan.prefixes) == num_prefix
    own = [report.prompt_tokens - num_prefix for report in reports]
    assert sum(len(chunk.token_ids) for plan in plans for chunk in plan.questions) == sum(own)
    assert sum(len(plan.decode) for plan in plans) == 3 * 4
    for n, ask in enumerate(asks):
        assert_same(engine.recordings[str(n)], lab.alone(**ask).recording)


def test_a_dozen_questions_about_one_video_are_answered_side_by_side(lab: Lab) -> None:
    """More rows read one prefix together than a small tile of a GPU's attention holds."""
    layers = [0, 3]
    asks = [
        {"question": f"{n} {QUESTIONS[n % 3]}", "compression": {"policy": "dycoke", "l": layer}}
        for n in range(9)
        for layer in layers
    ]
    engine = lab.engine(max_running_sequences=len(asks))
    engine.run(*(lab.sequence(str(n), max_tokens=6, **ask) for n, ask in enumerate(asks)))
    for n, ask in enumerate(asks):
        assert_same(engine.recordings[str(n)], lab.alone(max_tokens=6, **ask).recording)


def test_frames_that_repeat_are_encoded_once(lab: Lab) -> None:
    frames = moving_square(1, num_frames=6, size=lab.model.image_size)
    frames[1] = frames[0]
    frames[4] = frames[3]
    assert distinct_units(frames) == ((0, 2, 3, 5), (0, 0, 1, 2, 2, 3))
    still = lab.sequence("still")
    still.frames = frames
    engine = lab.engine(vision_batch_frames=6)
    engine.add(still)
    prefix = None
    while prefix is None or not prefix.is_embedded:
        engine.step()
        prefix = engine.states["still"].held_prefix

    *_, features = lab.reference_model.encode_frames(torch.from_numpy(frames))
    video = prefix.video
    assert video is not None and video.features is not None and len(video.features) == 4
    found = video.features.cpu()[list(video.sources)]
    torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-4)


# --- room ---


def test_a_full_cache_evicts_the_least_recently_used(lab: Lab) -> None:
    room = 2 * lab.prefix_bytes(**FULL) + lab.seat_bytes(**FULL)
    engine = lab.engine(kv_cache_bytes=room)

    def is_hit(video: int) -> bool:
        events = engine.run(lab.sequence(f"{video}", video=video, **FULL))[f"{video}"]
        return report_of(events).cache.has_prefix_hit

    hits = [video for video in (1, 2, 1, 3, 1, 2) if is_hit(video)]
    assert hits == [1, 1], "3 evicts 2, which had not been used for longer"


def test_sequences_wait_for_room_and_are_all_served(lab: Lab) -> None:
    room = lab.prefix_bytes(**FULL) + lab.seat_bytes(**FULL)
    engine = lab.engine(kv_cache_bytes=int(1.5 * room))
    for video in range(4):
        engine.add(lab.sequence(str(video), video=video, **FULL))
    engine.step()
    assert (engine.stats().num_running, engine.stats().num_waiting) == (1, 3)
    events = engine.drain()
    assert len(events) == 4
    for video in range(4):
        assert_same(engine.recordings[str(video)], lab.alone(video=video, **FULL).recording)


def test_what_just_fits_runs_and_what_can_never_fit_is_refused_at_once(lab: Lab) -> None:
    room = lab.prefix_bytes(**FULL) + lab.seat_bytes(**FULL)
    report_of(lab.engine(kv_cache_bytes=room).run(lab.sequence(**FULL))["a"])
    with pytest.raises(PromptTooLongError, match="memory"):
        lab.engine(kv_cache_bytes=room - 1).add(lab.sequence(**FULL))


@pytest.mark.parametrize("dp_cache", ["device", "host"])
@pytest.mark.parametrize(
    "compression", ["full", "dycoke", {"policy": "dycoke", "l": 0, "p": 0.1}], ids=str
)
def test_what_is_allocated_is_what_is_reserved(compression: Any, dp_cache: str, lab: Lab) -> None:
    """Once it decodes; on a CPU, whose host memory is its device's, less what "lies there"."""
    engine = lab.engine(dp_cache=dp_cache)
    engine.add(lab.sequence(compression=compression, max_tokens=9))
    while not engine.states["a"].sequence.output_token_ids:
        engine.step()
    reserved = engine.stats().kv_bytes_in_use
    if lab.backend == "cpu":
        reserved += engine.admission.host_budget.used_bytes
    assert engine.backend.allocated_bytes() == reserved
    ask = {"compression": compression, "max_tokens": 9}
    if dp_cache == "device":
        assert reserved == lab.prefix_bytes(**ask) + lab.seat_bytes(**ask)


def test_a_sequence_that_waits_evicts_nothing(lab: Lab) -> None:
    small: dict[str, Any] = {"compression": "full", "num_frames": 2, "max_tokens": 4}
    large: dict[str, Any] = {"compression": "full", "max_tokens": 100}
    sizes = [lab.prefix_bytes(**ask) + lab.seat_bytes(**ask) for ask in (small, large)]
    engine = lab.engine(kv_cache_bytes=lab.prefix_bytes(**small) + int(1.5 * sizes[1]))
    engine.run(lab.sequence("cached", video=1, **small))
    cached_bytes = engine.stats().kv_bytes_cached
    assert cached_bytes > 0
    engine.add(lab.sequence("runs", video=2, **large))
    engine.step()
    engine.add(lab.sequence("waits", video=3, **large))
    engine.step()
    assert engine.stats().num_waiting == 1
    assert engine.stats().kv_bytes_cached == cached_bytes
    engine.abort("runs")


def test_an_engine_that_ran_out_of_memory_gives_up_what_nobody_uses(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = lab.engine()
    engine.run(lab.sequence("before", video=1))
    assert engine.stats().kv_bytes_cached > 0

    def refuse(prefix: int, embedded: EmbeddedPrefix) -> None:
        raise MemoryError

    with monkeypatch.context() as patches:
        patches.setattr(engine.backend, "embed_prefix", refuse)
        engine.run(lab.sequence("fails", video=2))
    assert engine.stats().kv_bytes_cached == 0
    assert report_of(engine.run(lab.sequence("after", video=2))["after"])


def test_what_is_reused_costs_no_flops(lab: Lab) -> None:
    engine = lab.engine()
    cold = report_of(engine.run(lab.sequence("cold"))["cold"]).compression
    hit = report_of(engine.run(lab.sequence("hit"))["hit"]).compression
    assert hit.exact_flops_full == cold.exact_flops_full
    assert hit.exact_flops_actual < 0.5 * cold.exact_flops_actual


def test_work_under_way_is_dropped_with_its_last_holder(lab: Lab) -> None:
    engine = lab.engine(vision_batch_frames=4)
    engine.add(lab.sequence("one", num_frames=16))
    engine.add(lab.sequence("two", num_frames=16))
    engine.step()
    engine.abort("one")
    assert engine.stats().kv_bytes_in_use > 0, "the other still needs the video"
    engine.abort("two")
    assert engine.stats().kv_bytes_in_use == engine.stats().kv_bytes_cached == 0
    report = report_of(engine.run(lab.sequence("three", num_frames=16))["three"])
    assert not report.cache.has_features_hit


@pytest.mark.slow
def test_hundreds_of_short_sequences_leave_nothing_behind(lab: Lab) -> None:
    ask: dict[str, Any] = {"num_frames": 1, "max_tokens": 2}
    room = 3 * (lab.prefix_bytes(**ask) + lab.seat_bytes(**ask))
    engine: RecordingEngine = lab.engine(kv_cache_bytes=room)
    rng = np.random.default_rng(0)
    clips = {video: lab.sequence(video=video, **ask).frames for video in range(20)}
    for index in range(250):
        sequence = lab.sequence(str(index), **ask)
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


def test_forgotten_video_leaves_nothing_behind_and_others_stay(lab: Lab) -> None:
    engine = lab.engine()
    names = {"first": "one", "second": "one", "other": "two"}
    for video, (sequence_id, name) in enumerate(names.items()):
        sequence = lab.sequence(sequence_id, video=min(video, 1), question=QUESTIONS[video])
        sequence.video_name = name
        engine.run(sequence)
    before = engine.admission.num_prefixes
    engine.forget_video("one")
    assert engine.admission.num_prefixes < before
    again = lab.sequence("again", video=0)
    assert report_of(engine.run(again)["again"]).cache == CacheReport(False, False)


def test_forgotten_video_goes_with_the_last_sequence_that_holds_it(lab: Lab) -> None:
    engine = lab.engine()
    sequence = lab.sequence("running", max_tokens=4)
    sequence.video_name = "one"
    engine.add(sequence)
    events = [*engine.step(), *engine.step()]
    engine.forget_video("one")
    while engine.has_work:
        events += engine.step()
    assert_same(engine.recordings["running"], lab.alone(max_tokens=4).recording)
    assert engine.admission.num_prefixes == 0
    report = report_of(engine.run(lab.sequence("again", max_tokens=4))["again"])
    assert report.cache == CacheReport(False, False)
