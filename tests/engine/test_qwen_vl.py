"""Qwen2.5-VL and Qwen3-VL through the engine, against transformers, on both backends.

What is not compared: the processor's resizing, which is done where frames are read, and its pixels
bit for bit, for which it needs torchvision.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dycoke_core.errors import InvalidRequestError, PromptTooLongError
from dycoke_core.model.adapter import Text
from dycoke_core.model.loader import load_model
from dycoke_core.model.qwen_vl import QwenVL
from dycoke_core.sequence import FrameTiming
from tests.compression import slow_loops
from tests.engine.bench import Bench
from tests.engine.conftest import need_triton
from tests.engine.families import SETTINGS, TALL, WIDE, bench_of, qwen_sequence
from tests.engine.family_checks import (
    assert_answers_differ,
    assert_chunks_equal_whole_prefill,
    assert_company_changes_nothing,
    assert_equals_generate,
    assert_kernels_give_the_cpus_numbers,
    assert_replay_goes_on,
)
from tests.engine.qwen_reference import Qwen3Reference, QwenReference
from tests.engine.recording import (
    assert_same,
    assert_same_kept,
    assert_same_logits,
    report_of,
)
from tests.random_qwen import build_random_qwen2_5_vl, build_random_qwen3_vl

QUESTIONS = ["Describe the video.", "What color is the circle?", "How many objects move up?"]


FAMILIES = {
    "qwen2_5_vl": (build_random_qwen2_5_vl, QwenReference),
    "qwen3_vl": (build_random_qwen3_vl, Qwen3Reference),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def directory(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / family
    build, _ = FAMILIES[family]
    build(path)
    return path


@pytest.fixture(scope="module")
def model(directory: Path) -> QwenVL:
    torch.set_num_threads(1)
    model = load_model(directory, device="cpu", dtype="float32")
    assert isinstance(model, QwenVL)
    return model


@pytest.fixture(scope="module")
def reference(family: str, directory: Path) -> QwenReference:
    _, reference = FAMILIES[family]
    return reference(directory)


@pytest.fixture(params=["cpu", "cuda"])
def bench(request: pytest.FixtureRequest, model: QwenVL) -> Iterator[Bench[QwenVL]]:
    with bench_of(model, request.param, partial(qwen_sequence, model)) as bench:
        yield bench
    # The wrapper would keep a request's position offset here, and hand it to the next one.
    assert model.model.model.rope_deltas is None


# --- prompts, positions, features ---


@pytest.mark.parametrize("seconds", [None, 0.4, 5.0])
@pytest.mark.parametrize(("num_frames", "size"), [(1, TALL), (7, TALL), (8, WIDE)])
@torch.inference_mode()
def test_ids_and_positions_are_transformers(
    num_frames: int,
    size: tuple[int, int],
    seconds: float | None,
    model: QwenVL,
    reference: QwenReference,
) -> None:
    asked = qwen_sequence(model, num_frames=num_frames, size=size, seconds=seconds)
    inputs = reference.inputs(asked)
    layout = model.lay_out(asked.messages, model.clip(asked.frames.shape, asked.timing))
    num_visual = layout.num_units * layout.tokens_per_unit
    assert inputs["pixel_values_videos"].shape[0] == 4 * num_visual
    ids: list[int] = []
    for segment in layout.prefix:
        if isinstance(segment, Text):
            ids += segment.token_ids
        else:
            ids += [reference.video_token_id] * (len(segment.indices) * layout.tokens_per_unit)
    assert [*ids, *layout.question_ids] == inputs["input_ids"][0].tolist()

    every = torch.arange(num_visual)
    features = torch.zeros(layout.num_units, layout.tokens_per_unit, model.feature_size)
    per_unit = (layout.tokens_per_unit,) * layout.num_units
    embedded = model.embed(layout, features, every, per_unit)
    expected, num_prefix = reference.positions(inputs), layout.num_prefix_text + num_visual
    assert torch.equal(embedded.positions, expected[:, :num_prefix])
    is_visual = torch.tensor(ids) == reference.video_token_id
    assert [place for run in embedded.visual for place in run] == is_visual.nonzero()[:, 0].tolist()
    next_position = model.next_position(layout, num_visual)
    own = torch.arange(next_position, next_position + len(layout.question_ids))
    assert torch.equal(expected[:, num_prefix:], own.expand(3, -1))


@pytest.mark.parametrize("size", [TALL, WIDE])
@torch.inference_mode()
def test_features_are_transformers(
    size: tuple[int, int], model: QwenVL, reference: QwenReference
) -> None:
    asked = qwen_sequence(model, size=size, num_frames=8)
    *pauses, features = model.encode_frames(torch.from_numpy(asked.frames.copy()))
    assert pauses == [None, None]
    expected = reference.features(reference.inputs(asked))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_pixels_are_those_of_the_models_image_processor(model: QwenVL) -> None:
    """For an image the processor repeats it in time."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    frame = qwen_sequence(model, num_frames=1).frames[0]
    settings = {"image_mean": model.patches.mean, "image_std": model.patches.std}
    processor = Qwen2VLImageProcessorPil(
        do_resize=False, patch_size=model.patches.patch, **settings
    )
    expected = torch.as_tensor(np.array(processor(frame)["pixel_values"]))
    twice = torch.from_numpy(np.stack([frame, frame]))
    patches = model.patches(twice, torch.float32, model.patches.constants(model.device))
    torch.testing.assert_close(patches, expected.view_as(patches), rtol=0, atol=1e-6)


# --- the engine ---


@pytest.mark.parametrize(("num_frames", "size"), [(1, WIDE), (7, TALL)])
@pytest.mark.parametrize("seconds", [None, 5.0])
@torch.inference_mode()
def test_full_tokens_equal_transformers_greedy_generate(
    num_frames: int,
    size: tuple[int, int],
    seconds: float | None,
    bench: Bench[QwenVL],
    reference: QwenReference,
) -> None:
    asked = bench.sequence(
        num_frames=num_frames, size=size, seconds=seconds, compression="full", max_tokens=16
    )
    assert_equals_generate(asked, bench, reference)


def test_answers_depend_on_video_question_and_time(bench: Bench[QwenVL]) -> None:
    """Otherwise the tests here would prove little."""
    asks: list[dict[str, Any]] = [
        {},
        {"video": 2},
        {"question": QUESTIONS[1]},
        {"seconds": 1.0},
        {"size": WIDE},
    ]
    assert_answers_differ(asks, bench)


@pytest.mark.parametrize("layer", range(5))
def test_dycoke_that_drops_nothing_equals_full_tokens(layer: int, bench: Bench[QwenVL]) -> None:
    full = bench.alone(compression="full").recording
    settings = {"policy": "dycoke", "k": 0.0, "p": 0.0, "l": layer}
    none = bench.alone(compression=settings).recording
    assert_same_logits(none.logits, full.logits)


STAGES: list[dict[str, Any]] = [
    {},
    {"threshold": 0.1, "l": 1},
    {"k": 0.5, "l": 0, "p": 0.5},
    {"k": 0.9, "l": 2, "p": 1.0},
]


@pytest.mark.parametrize("num_frames", [1, 9])
@pytest.mark.parametrize("settings", STAGES, ids=str)
@torch.inference_mode()
def test_both_stages_equal_slow_loops(
    settings: dict[str, Any], num_frames: int, bench: Bench[QwenVL], reference: QwenReference
) -> None:
    asked = bench.sequence(compression={"policy": "dycoke", **settings}, num_frames=num_frames)
    engine = bench.engine()
    report = report_of(engine.run(asked)["a"])
    k = settings.get("k", 0.7)
    prompt = reference.compressed(
        reference.inputs(asked), lambda features: slow_loops.ttm(features, k)
    )
    compression = asked.compression
    slow = slow_loops.SlowStageTwo(
        prompt.visual, layer=compression.l, p=compression.p, threshold=compression.threshold
    )
    logits = slow_loops.decode_slowly(
        bench.model,
        prompt.embeds,
        asked.output_token_ids,
        slow,
        positions=prompt.positions,
        layer_adds=prompt.layer_adds,
    )
    counts = report.compression
    assert (counts.visual_tokens_prefill, counts.refreshes) == (
        len(prompt.visual),
        slow.num_refreshes,
    )
    assert counts.visual_tokens_in == 6 * ((num_frames + 1) // 2)
    assert not any(step.is_borderline for step in slow.steps), "the seed gives clear choices"
    recording = engine.recordings["a"]
    assert_same_kept(recording.kept, [torch.tensor(step.kept).long() for step in slow.steps])
    assert_same_logits(recording.logits, logits)


def test_a_mix_equals_single_runs(bench: Bench[QwenVL]) -> None:
    """Of sizes, times, policies and lengths."""
    published = tuple(bench.alone(video=3).token_ids[:3])
    asks: dict[str, dict[str, Any]] = {
        "tall": {},
        "wide": {"size": WIDE, "question": QUESTIONS[1]},
        "full": {"compression": "full", "video": 2},
        "slow": {"seconds": 1.0},
        "no time": {"seconds": None},
        "odd": {"num_frames": 5, "size": WIDE, "compression": {"policy": "dycoke", "l": 0}},
        "vidcom2": {"compression": {"policy": "vidcom2", "retained_ratio": 0.4}},
        "sampled": {"temperature": 0.8, "seed": 7},
        "resumed": {"video": 3, "forced": published},
    }
    assert_company_changes_nothing(asks, bench)


@pytest.mark.parametrize("dp_cache", ["device", "host"])
@pytest.mark.parametrize("size", [1, 5])
def test_chunked_prefill_equals_whole_prefill(
    size: int, dp_cache: str, bench: Bench[QwenVL]
) -> None:
    assert_chunks_equal_whole_prefill({}, bench, size=size, dp_cache=dp_cache)


@pytest.mark.parametrize("num_published", [1, 5, 7])
def test_a_replayed_answer_goes_on_as_it_would_have(
    num_published: int, bench: Bench[QwenVL]
) -> None:
    assert_replay_goes_on(num_published, bench)


def test_no_position_offset_of_one_request_reaches_another(bench: Bench[QwenVL]) -> None:
    """Requests of other sizes and times take turns, with a stranger's offset on the wrapper."""
    asks: dict[str, dict[str, Any]] = {
        "first": {"max_tokens": 8},
        "second": {"size": WIDE, "seconds": None, "num_frames": 4},
    }
    expected = {name: bench.alone(**ask).recording for name, ask in asks.items()}
    engine = bench.engine()
    first, second = (bench.sequence(name, **ask) for name, ask in asks.items())
    wrapper = bench.model.model.model
    wrapper.rope_deltas = torch.tensor([[1000]])
    try:
        engine.add(first)
        while len(first.output_token_ids) < 3:
            engine.step()
        engine.add(second)
        engine.drain()
        assert wrapper.rope_deltas.tolist() == [[1000]]  # and nothing wrote it
    finally:
        wrapper.rope_deltas = None
    for name in asks:
        assert_same(engine.recordings[name], expected[name])


def test_a_prefix_is_of_its_frames_times(bench: Bench[QwenVL]) -> None:
    engine = bench.engine()
    engine.run(bench.sequence("first"))
    reports = engine.run(bench.sequence("same"), bench.sequence("slower", seconds=6.0))
    assert report_of(reports["same"]).cache.has_prefix_hit
    cache = report_of(reports["slower"]).cache
    assert (cache.has_features_hit, cache.has_prefix_hit) == (True, False)


def test_frames_that_repeat_are_encoded_once(bench: Bench[QwenVL]) -> None:
    still = bench.sequence("still", num_frames=8)
    still.frames = np.repeat(still.frames[:1], 8, axis=0)
    engine = bench.engine()
    moving = report_of(engine.run(bench.sequence("moving", num_frames=8))["moving"])
    report = report_of(engine.run(still)["still"])
    assert report.compression.exact_flops_full == moving.compression.exact_flops_full
    assert report.compression.exact_flops_actual < moving.compression.exact_flops_actual


def test_receipts_count_units_and_name_the_pruned_layers(bench: Bench[QwenVL]) -> None:
    events = bench.engine().run(
        bench.sequence("dycoke", num_frames=7, compression={"policy": "dycoke", "l": 2}),
        bench.sequence("full", num_frames=8, size=WIDE, compression="full"),
    )
    dycoke, full = (report_of(events[name]).compression for name in ("dycoke", "full"))
    assert (dycoke.units, dycoke.tokens_per_unit, dycoke.visual_tokens_in) == (4, 6, 24)
    assert dycoke.kept_per_frame == (6, 1, 1, 1)
    assert dycoke.pruned_layers == (2, 3)
    assert (full.units, full.tokens_per_unit, full.visual_tokens_in) == (4, 8, 32)
    assert full.pruned_layers == ()


def test_kept_sets_are_told_by_units_and_their_grid(bench: Bench) -> None:
    sequence = bench.sequence(
        "a", num_frames=8, size=WIDE, compression={"policy": "dycoke", "l": 2}
    )
    sequence.wants_kept_sets = True
    report = report_of(bench.engine().run(sequence)["a"])
    kept = report.kept
    assert kept is not None and kept.rows * kept.columns == report.compression.tokens_per_unit
    assert (kept.units, kept.columns > kept.rows) == (4, True)
    bits = np.unpackbits(np.frombuffer(kept.stage_one, np.uint8), count=32).reshape(4, 8)
    assert tuple(bits.sum(axis=1)) == report.compression.kept_per_frame


@pytest.mark.slow
def test_the_kernels_give_the_cpus_numbers(model: QwenVL) -> None:
    """The kernels themselves, in Triton's interpreter where there is no GPU. Short: it is slow."""
    need_triton()
    ask: dict[str, Any] = {"num_frames": 3, "size": (1, 2), "question": "How?", "max_tokens": 3}
    make = partial(qwen_sequence, model)
    kernels, cpu = (Bench(model, name, make, SETTINGS) for name in ("cuda", "cpu"))
    assert_kernels_give_the_cpus_numbers(kernels, cpu, ask)


@torch.inference_mode()
def test_a_conversation_without_a_video_equals_transformers_too(
    bench: Bench[QwenVL], reference: QwenReference
) -> None:
    asked = bench.sequence(max_tokens=8)
    asked.frames = asked.timing = None
    engine = bench.engine()
    report = report_of(engine.run(asked)["a"])
    prompt = bench.model.prompt_encoder(asked.messages, has_video=False)
    ids = torch.tensor([[*prompt.ids_before_video, *prompt.ids_after_video]])
    answer = reference.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert asked.output_token_ids == answer.sequences[0, ids.shape[1] :].tolist()
    assert_same_logits(engine.recordings["a"].logits, [step[0] for step in answer.logits])
    assert (report.compression.units, report.compression.visual_tokens_in) == (0, 0)


@pytest.mark.parametrize("names", [("text", "last"), ("first", "text", "last")])
def test_a_conversation_without_a_video_leaves_a_video_beside_it_unchanged(
    names: tuple[str, ...], bench: Bench
) -> None:
    """In one pass, since the features are there from questions about other prefixes."""
    videos = {"first": 1, "last": 2}
    expected = {name: bench.alone(video=video).recording for name, video in videos.items()}
    engine = bench.engine()
    for name, video in videos.items():
        engine.run(bench.sequence(f"before {name}", video=video, compression="full"))
    asked = {name: bench.sequence(name, video=videos.get(name, 1)) for name in names}
    asked["text"].frames = asked["text"].timing = None
    engine.run(*asked.values())
    for name in set(names) - {"text"}:
        assert_same(engine.recordings[name], expected[name])


# --- limits ---


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 224, 225, 3), "multiples of"),
        ((0, 224, 224, 3), "F of at least 1"),
        ((4, 224, 224), "height, width, 3"),
        ((1, 56 * 224, 56 * 224, 3), r"at most \d+ pixels"),
    ],
)
def test_frames_that_the_model_cannot_take_are_refused(
    shape: tuple[int, ...], message: str, bench: Bench
) -> None:
    asked = bench.sequence()
    asked.timing = None
    asked.frames = np.broadcast_to(np.zeros((), np.uint8), shape)
    with pytest.raises(InvalidRequestError, match=message):
        bench.engine().add(asked)


def test_a_timing_of_other_frames_is_refused(bench: Bench[QwenVL]) -> None:
    asked = bench.sequence()
    asked.timing = FrameTiming((0.0, 1.0))
    with pytest.raises(InvalidRequestError, match="a time for each frame"):
        bench.engine().add(asked)


def test_a_prompt_beyond_the_models_positions_is_refused(bench: Bench[QwenVL]) -> None:
    with pytest.raises(PromptTooLongError):
        bench.engine().add(bench.sequence(max_tokens=2048))


def test_the_card_says_how_frames_become_tokens(bench: Bench[QwenVL]) -> None:
    card = bench.engine().card
    assert card.architecture in (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
    )
    multiple = bench.model.patches.limits.multiple
    assert (card.image_size, card.tokens_per_frame) == (14 * multiple, 196)
    assert card.frames_per_unit == 2
    assert card.frame_resizing == "bicubic"
