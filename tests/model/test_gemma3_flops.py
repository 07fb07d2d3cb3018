"""What Gemma 3's tower and prompts cost, against torch's own count."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from dycoke_core.compression.flops import prefill_flops, vision_flops
from dycoke_core.model.gemma3 import Gemma3
from dycoke_core.model.loader import load_model
from tests.random_gemma import IMAGE_SIZE, WINDOW, build_random_gemma3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / "gemma3"
    build_random_gemma3(path)
    return path


@torch.no_grad()
def test_flops_are_those_counted_by_torch(directory: Path) -> None:
    """torch counts whole squares of queries and keys, masked or not."""
    model = load_model(directory, device="cpu", dtype="float32")
    assert isinstance(model, Gemma3)
    eager = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with FlopCounterMode(display=False) as counter:
        eager.model.get_image_features(torch.zeros(3, 3, IMAGE_SIZE, IMAGE_SIZE))
    expected = vision_flops(model.vision_geometry(IMAGE_SIZE, IMAGE_SIZE), num_units=3)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)

    with FlopCounterMode(display=False) as counter:
        eager(input_ids=torch.ones(1, 40, dtype=torch.long), logits_to_keep=1, use_cache=False)
    expected = prefill_flops(model.text_geometry, 40, is_causal=False)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)  # and the rotation


@torch.no_grad()
def test_windows_are_counted_pair_by_pair(directory: Path) -> None:
    text = load_model(directory, device="cpu", dtype="float32").text_geometry
    assert (text.window, text.num_windowed_layers, text.num_layers) == (WINDOW, 4, 6)
    pairs = [sum(min(n + 1, reach) for n in range(40)) for reach in (WINDOW, 40)]
    products = 2 * text.num_heads * text.head_size * (4 * pairs[0] + 2 * pairs[1])
    squares = 2 * text.num_heads * text.head_size * 6 * 40**2
    exact, whole = (prefill_flops(text, 40, is_causal=causal) for causal in (True, False))
    assert whole - exact == pytest.approx(2 * (squares - products))
