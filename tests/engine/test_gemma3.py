"""Gemma 3 through the engine, against transformers, on both backends."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dycoke_core.errors import InvalidRequestError, PromptTooLongError
from dycoke_core.model.adapter import Text
from dycoke_core.model.gemma3 import Gemma3
from dycoke_core.model.loader import load_model
from dycoke_core.sequence import ChatMessage
from tests.compression import slow_loops
from tests.engine.bench import Bench
from tests.engine.conftest import need_triton
from tests.engine.families import SETTINGS, bench_of, gemma_sequence
from tests.engine.family_checks import (
    assert_answers_differ,
    assert_chunks_equal_whole_prefill,
    assert_company_changes_nothing,
    assert_equals_generate,
    assert_kernels_give_the_cpus_numbers,
    assert_replay_goes_on,
)
from tests.engine.gemma_reference import GemmaReference, SlowWindows
from tests.engine.recording import (
    assert_same,
    assert_same_kept,
    assert_same_logits,
    report_of,
)
from tests.random_gemma import IMAGE_SIZE, WINDOW, build_random_gemma3

QUESTIONS = [
    "Describe the video.",
    "What color is the circle?",
    # Longer than a window, so that what follows sees none of the video in most layers.
    "How many objects move up? How many objects move down? Which of them moves left, and which is "
    "the one that blinks?",
]
WINDOWS = [WINDOW, WINDOW, None] * 2


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / "gemma3"
    build_random_gemma3(path)
    return path


@pytest.fixture(scope="module")
def model(directory: Path) -> Gemma3:
    torch.set_num_threads(1)
    model = load_model(directory, device="cpu", dtype="float32")
    assert isinstance(model, Gemma3)
    return model


@pytest.fixture(scope="module")
def reference(directory: Path) -> GemmaReference:
    return GemmaReference(directory)


@pytest.fixture(params=["cpu", "cuda"])
def bench(request: pytest.FixtureRequest, model: Gemma3) -> Iterator[Bench[Gemma3]]:
    with bench_of(model, request.param, gemma_sequence) as bench:
        yield bench


# --- prompts, positions, pixels, features ---


@pytest.mark.parametrize("num_frames", [1, 7])
@torch.inference_mode()
def test_ids_and_positions_are_transformers(
    num_frames: int, model: Gemma3, reference: GemmaReference
) -> None:
    asked = gemma_sequence(num_frames=num_frames)
    expected = reference.inputs(asked)["input_ids"][0].tolist()
    layout = model.lay_out(asked.messages, model.clip(asked.frames.shape, None))
    ids: list[int] = []
    for segment in layout.prefix:
        if isinstance(segment, Text):
            ids += segment.token_ids
        else:
            ids += [reference.image_token_id] * (len(segment.indices) * layout.tokens_per_unit)
    assert [*ids, *layout.question_ids] == expected

    num_visual = layout.num_units * layout.tokens_per_unit
    features = torch.zeros(layout.num_units, layout.tokens_per_unit, model.feature_size)
    per_unit = (layout.tokens_per_unit,) * layout.num_units
    embedded = model.embed(layout, features, torch.arange(num_visual), per_unit)
    assert embedded.positions.tolist() == [list(range(len(ids)))]
    is_visual = [place for place, token in enumerate(ids) if token == reference.image_token_id]
    assert [place for run in embedded.visual for place in run] == is_visual
    assert model.next_position(layout, num_visual) == len(ids)


@torch.inference_mode()
def test_tokens_that_stay_keep_their_positions(model: Gemma3) -> None:
    asked = gemma_sequence(num_frames=3)
    layout = model.lay_out(asked.messages, model.clip(asked.frames.shape, None))
    features = torch.zeros(3, 4, model.feature_size)
    whole = model.embed(layout, features, torch.arange(12), (4, 4, 4))
    some = model.embed(layout, features, torch.tensor([0, 1, 2, 3, 5, 11]), (4, 1, 1))
    visual = [place for run in whole.visual for place in run]
    dropped = {visual[n] for n in (4, 6, 7, 8, 9, 10)}
    expected = [place for place in range(whole.positions.shape[1]) if place not in dropped]
    assert some.positions[0].tolist() == expected
    assert model.next_position(layout, 6) == model.next_position(layout, 12)


def test_several_turns_are_rendered_as_transformers_does(
    model: Gemma3, reference: GemmaReference
) -> None:
    asked = gemma_sequence(num_frames=2)
    asked.messages = (
        ChatMessage("system", "You are a helpful assistant."),
        ChatMessage("user", QUESTIONS[1]),
        ChatMessage("assistant", "It is red."),
        ChatMessage("user", QUESTIONS[0]),
    )
    layout = model.lay_out(asked.messages, model.clip(asked.frames.shape, None), video_turn=3)
    ids = reference.inputs(asked)["input_ids"][0].tolist()
    assert tuple(i for i in ids if i != reference.image_token_id) == (
        *layout.text_ids,
        *layout.question_ids,
    )


@torch.inference_mode()
def test_pixels_and_features_are_transformers(model: Gemma3, reference: GemmaReference) -> None:
    asked = gemma_sequence(num_frames=5)
    inputs = reference.inputs(asked)
    frames = torch.from_numpy(asked.frames.copy())
    pixels = model.normalizer(frames, torch.float32)
    torch.testing.assert_close(pixels, inputs["pixel_values"], rtol=0, atol=1e-6)
    *pauses, features = model.encode_frames(frames)
    assert pauses == [None]
    torch.testing.assert_close(features, reference.features(inputs), rtol=1e-4, atol=1e-5)


# --- the engine ---


@pytest.mark.parametrize("num_frames", [1, 7])
@pytest.mark.parametrize("question", QUESTIONS[1:])
@torch.inference_mode()
def test_full_tokens_equal_transformers_greedy_generate(
    num_frames: int, question: str, bench: Bench[Gemma3], reference: GemmaReference
) -> None:
    """Of answers longer than a window."""
    asked = bench.sequence(
        num_frames=num_frames, question=question, compression="full", max_tokens=16
    )
    assert_equals_generate(asked, bench, reference)


def test_answers_depend_on_video_and_question(bench: Bench[Gemma3]) -> None:
    """Otherwise the tests here would prove little."""
    asks: list[dict[str, Any]] = [{}, {"video": 2}, {"question": QUESTIONS[1]}, {"num_frames": 3}]
    assert_answers_differ(asks, bench)


@pytest.mark.parametrize("layer", range(7))
def test_dycoke_that_drops_nothing_equals_full_tokens(layer: int, bench: Bench[Gemma3]) -> None:
    full = bench.alone(compression="full", question=QUESTIONS[2]).recording
    nothing = {"policy": "dycoke", "k": 0.0, "p": 0.0, "l": layer}
    none = bench.alone(compression=nothing, question=QUESTIONS[2]).recording
    assert_same_logits(none.logits, full.logits)


STAGES: list[dict[str, Any]] = [
    {},
    {"threshold": 0.1, "l": 1},
    {"k": 0.5, "l": 0, "p": 0.5},
    {"k": 0.9, "l": 5, "p": 1.0},
    {"k": 1.0, "l": 3, "p": 0.3},
]


@pytest.mark.parametrize("num_frames", [1, 9])
@pytest.mark.parametrize("settings", STAGES, ids=str)
@torch.inference_mode()
def test_both_stages_equal_slow_loops(
    settings: dict[str, Any], num_frames: int, bench: Bench[Gemma3], reference: GemmaReference
) -> None:
    """Of six layers the third and the sixth attend to everything: one scores, the other prunes."""
    asked = bench.sequence(compression={"policy": "dycoke", **settings}, num_frames=num_frames)
    engine = bench.engine()
    report = report_of(engine.run(asked)["a"])
    k = settings.get("k", 0.7)
    prompt = reference.compressed(
        reference.inputs(asked), lambda features: slow_loops.ttm(features, k)
    )
    slow = SlowWindows(
        prompt,
        windows=WINDOWS,
        scoring=2,
        pruned=[5],
        p=asked.compression.p,
        threshold=asked.compression.threshold,
    )
    logits = slow_loops.decode_slowly(
        bench.model, prompt.embeds, asked.output_token_ids, slow, positions=prompt.positions
    )
    counts = report.compression
    assert counts.pruned_layers == (5,)
    assert (counts.visual_tokens_prefill, counts.refreshes) == (
        len(prompt.visual),
        slow.num_refreshes,
    )
    assert not any(step.is_borderline for step in slow.steps), "the seed gives clear choices"
    recording = engine.recordings["a"]
    assert_same_kept(recording.kept, [torch.tensor(step.kept).long() for step in slow.steps])
    assert_same_logits(recording.logits, logits)


def test_a_mix_equals_single_runs(bench: Bench[Gemma3]) -> None:
    """Of lengths, policies and questions."""
    published = tuple(bench.alone(video=3).token_ids[:3])
    asks: dict[str, dict[str, Any]] = {
        "plain": {},
        "long": {"question": QUESTIONS[2], "max_tokens": 14},
        "full": {"compression": "full", "video": 2},
        "odd": {"num_frames": 5, "compression": {"policy": "dycoke", "l": 0}},
        "off": {"num_frames": 5, "compression": {"policy": "dycoke", "l": 6}},
        "vidcom2": {"compression": {"policy": "vidcom2", "retained_ratio": 0.4}},
        "random": {"compression": {"policy": "random_kv"}},
        "sampled": {"temperature": 0.8, "seed": 7},
        "resumed": {"video": 3, "forced": published},
    }
    assert_company_changes_nothing(asks, bench)


@pytest.mark.parametrize("dp_cache", ["device", "host"])
@pytest.mark.parametrize("size", [1, 5, 11])
def test_chunked_prefill_equals_whole_prefill(
    size: int, dp_cache: str, bench: Bench[Gemma3]
) -> None:
    """An image's tokens see each other, so it goes in one chunk even where that is too small."""
    ask = {"question": QUESTIONS[2]}
    assert_chunks_equal_whole_prefill(ask, bench, size=size, dp_cache=dp_cache)


@pytest.mark.parametrize("num_published", [1, 5, 7])
def test_a_replayed_answer_goes_on_as_it_would_have(
    num_published: int, bench: Bench[Gemma3]
) -> None:
    assert_replay_goes_on(num_published, bench)


@torch.inference_mode()
def test_a_conversation_without_a_video_equals_transformers_too(
    bench: Bench[Gemma3], reference: GemmaReference
) -> None:
    asked = bench.sequence(question=QUESTIONS[2], max_tokens=14)
    asked.frames = None
    assert_equals_generate(asked, bench, reference)


def test_a_conversation_without_a_video_leaves_a_video_beside_it_unchanged(
    bench: Bench[Gemma3],
) -> None:
    expected = bench.alone(video=2).recording
    engine = bench.engine()
    engine.run(bench.sequence("before", video=2, compression="full"))  # features are there
    text = bench.sequence("text")
    text.frames = None
    engine.run(text, bench.sequence("video", video=2))
    assert_same(engine.recordings["video"], expected)


def test_receipts_name_the_layers_that_attend_to_fewer_tokens(bench: Bench[Gemma3]) -> None:
    asked = bench.sequence(num_frames=8)
    c = report_of(bench.engine().run(asked)["a"]).compression
    assert (c.units, c.tokens_per_unit, c.rows, c.columns) == (8, 4, 2, 2)
    assert (c.visual_tokens_in, c.visual_tokens_prefill, c.visual_tokens_decode) == (32, 14, 4)
    assert c.pruned_layers == (5,)
    assert c.retained_ratio_decode_all_layers == pytest.approx((5 * 14 + 4) / (6 * 32))


def test_receipts_count_what_windows_hide(bench: Bench[Gemma3]) -> None:
    report = report_of(bench.engine().run(bench.sequence(compression="full"))["a"])
    row = 2 * 2 * 16 * 4  # keys and values, heads, their size, float32
    num_tokens = report.prompt_tokens + report.completion_tokens - 1
    assert report.memory.kv_bytes == (2 * num_tokens + 4 * WINDOW) * row
    assert report.memory.kv_bytes == report.memory.kv_bytes_full_tokens


@pytest.mark.slow
def test_the_kernels_give_the_cpus_numbers(model: Gemma3) -> None:
    """The kernels themselves, in Triton's interpreter where there is no GPU. Short: it is slow."""
    need_triton()
    ask: dict[str, Any] = {"num_frames": 3, "question": "How?", "max_tokens": 3}
    kernels, cpu = (Bench(model, name, gemma_sequence, SETTINGS) for name in ("cuda", "cpu"))
    assert_kernels_give_the_cpus_numbers(kernels, cpu, ask)


# --- limits ---


@pytest.mark.parametrize("shape", [(4, 56, 55, 3), (0, 56, 56, 3), (4, 56, 56), (4, 112, 112, 3)])
def test_frames_that_the_model_cannot_take_are_refused(
    shape: tuple[int, ...], bench: Bench[Gemma3]
) -> None:
    asked = bench.sequence()
    asked.frames = np.broadcast_to(np.zeros((), np.uint8), shape)
    with pytest.raises(InvalidRequestError, match="frames must be"):
        bench.engine().add(asked)


def test_turns_that_its_template_does_not_take_are_refused(bench: Bench[Gemma3]) -> None:
    asked = bench.sequence()
    asked.messages = (ChatMessage("user", "One."), ChatMessage("user", "Two."))
    with pytest.raises(InvalidRequestError, match="template"):
        bench.engine().add(asked)


@pytest.mark.parametrize("token", ["<start_of_image>", "<image_soft_token>", "<end_of_turn>"])
def test_text_that_forges_an_image_is_refused(token: str, bench: Bench[Gemma3]) -> None:
    with pytest.raises(InvalidRequestError, match="control token"):
        bench.engine().add(bench.sequence(question=f"What is {token}?"))


def test_positions_beyond_the_models_are_refused_though_few_tokens_stay(
    bench: Bench[Gemma3],
) -> None:
    """Of 150 frames of 11 tokens with their markers."""
    most = {"compression": {"policy": "dycoke", "k": 1.0}, "num_frames": 150}
    bench.engine().add(bench.sequence("fits", max_tokens=300, **most))
    with pytest.raises(PromptTooLongError, match="2048 positions"):
        bench.engine().add(bench.sequence("too long", max_tokens=700, **most))


def test_the_card_says_how_frames_become_tokens(bench: Bench[Gemma3]) -> None:
    card = bench.engine().card
    assert card.architecture == "Gemma3ForConditionalGeneration"
    assert (card.image_size, card.tokens_per_frame, card.frames_per_unit) == (IMAGE_SIZE, 4, 1)
    assert card.frame_limits is None
    assert card.frame_resizing == "bilinear"
