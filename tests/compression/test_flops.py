"""FLOPs against the paper's tables and against torch's own counter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaOnevisionForConditionalGeneration

from dycoke_core.compression.flops import (
    AnswerShape,
    decode_flops,
    exact_flops,
    paper_flops,
    prefill_flops,
    vision_flops,
)
from dycoke_core.model.llava_onevision import LlavaOnevision

SIZES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_layers": 24},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_layers": 28},
    "72B": {"hidden_size": 8192, "intermediate_size": 29568, "num_layers": 80},
}


# Paper tables 1 and 6; it rounds and truncates, and gives 3.4 where its formula gives 3.54.
@pytest.mark.parametrize(
    ("size", "num_frames", "k", "published", "tolerance"),
    [
        ("7B", 32, 0.0, 41.4, 0.05),
        ("7B", 16, 0.0, 18.99, 0.01),
        ("7B", 32, 0.3, 30.8, 0.05),
        ("7B", 32, 0.5, 24.1, 0.15),
        ("7B", 32, 0.7, 17.91, 0.1),
        ("72B", 32, 0.0, 436.1, 0.1),
        ("0.5B", 32, 0.0, 3.4, 0.15),
    ],
)
def test_the_formula_reproduces_the_papers_tables(
    size: str, num_frames: int, k: float, published: float, tolerance: float
) -> None:
    visual_tokens = 196 * num_frames * (1 - 0.75 * k)
    teraflops = paper_flops(visual_tokens, **SIZES[size]) / 1e12
    assert teraflops == pytest.approx(published, abs=tolerance)


@pytest.fixture(scope="module")
def eager_model(random_checkpoint: Path) -> LlavaOnevisionForConditionalGeneration:
    """Fused attention goes uncounted on a CPU."""
    return LlavaOnevisionForConditionalGeneration.from_pretrained(
        random_checkpoint, dtype=torch.float32, attn_implementation="eager"
    )


def test_vision_flops_are_those_counted_by_torch(
    tiny_model: LlavaOnevision, eager_model: LlavaOnevisionForConditionalGeneration
) -> None:
    pixels = torch.zeros(1, 3, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        eager_model.model.get_video_features(pixels)
    expected = vision_flops(tiny_model.vision_geometry(224, 224), num_units=3)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


def test_prefill_flops_are_those_counted_by_torch(
    tiny_model: LlavaOnevision, eager_model: LlavaOnevisionForConditionalGeneration
) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        eager_model(input_ids=torch.full((1, 50), 7), logits_to_keep=1)
    # Eager attention multiplies the masked pairs too.
    expected = prefill_flops(tiny_model.text_geometry, 50, is_causal=False)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-4)


def test_decode_flops_are_those_counted_by_torch(
    tiny_model: LlavaOnevision, eager_model: LlavaOnevisionForConditionalGeneration
) -> None:
    with torch.no_grad():
        past = eager_model(input_ids=torch.full((1, 50), 7), use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            for _ in range(3):
                eager_model(input_ids=torch.full((1, 1), 7), past_key_values=past)
    shape = AnswerShape(
        num_units=0,
        num_text_tokens=10,
        num_visual_tokens=40,
        num_decode_tokens=40,
        num_pruned_layers=0,
        num_decode_steps=3,
    )
    expected = decode_flops(tiny_model.text_geometry, shape)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-4)


def test_pruned_layers_attend_to_fewer_keys(tiny_model: LlavaOnevision) -> None:
    text, vision = tiny_model.text_geometry, tiny_model.vision_geometry(224, 224)
    full = AnswerShape(8, 20, 392, 392, 0, num_decode_steps=10)
    pruned = AnswerShape(8, 20, 392, 92, 4, num_decode_steps=10)
    hidden_keys = 10 * 300 * (6 - 2)
    saved = 2 * 2 * text.num_heads * text.head_size * hidden_keys
    difference = exact_flops(vision, text, full) - exact_flops(vision, text, pruned)
    assert difference == pytest.approx(saved)


def test_windows_hide_what_is_further_back(tiny_model: LlavaOnevision) -> None:
    text = tiny_model.text_geometry
    windowed = replace(text, num_windowed_layers=4, window=12)
    seen = [min(token + 1, 12) for token in range(60)]
    hidden = 4 * sum(token + 1 - seen[token] for token in range(50))
    per_pair = 2 * 2 * text.num_heads * text.head_size
    assert prefill_flops(text, 50) - prefill_flops(windowed, 50) == pytest.approx(per_pair * hidden)
    shape = AnswerShape(0, 10, 40, 40, 0, num_decode_steps=10)
    hidden = 4 * sum(token + 1 - seen[token] for token in range(50, 60))
    difference = decode_flops(text, shape) - decode_flops(windowed, shape)
    assert difference == pytest.approx(per_pair * hidden)
