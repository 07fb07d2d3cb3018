"""A card's account of the frames that suit a model, without torch."""

import subprocess
import sys
from typing import Any

import pytest

from dycoke_core.engine_card import EngineCard, EngineStats
from dycoke_core.model_frames import PixelLimits

LIMITS = PixelLimits(multiple=28, min_pixels=28 * 28, max_pixels=10**6)


def card(**fields: Any) -> EngineCard:
    usual: dict[str, Any] = {
        "weights_digest": "w",
        "device": "cpu",
        "dtype": "float32",
        "architecture": "A",
        "image_size": 224,
        "frame_limits": None,
        "frame_spread": "floor",
        "frame_rate": None,
        "frame_resizing": "decoder",
        "tokens_per_frame": 49,
        "frames_per_unit": 1,
        "num_layers": 6,
        "max_model_tokens": 4096,
        "max_words_per_token": 1,
        "prefill_chunk_tokens": 64,
        "sampler_version": 3,
        "backend": "cpu",
        "max_running_sequences": 4,
    }
    return EngineCard(**usual | fields)


@pytest.mark.parametrize("max_pixels", [None, 10, 10**9])
def test_a_model_of_square_frames_takes_no_other_size(max_pixels: int | None) -> None:
    assert card().frame_size(32, max_pixels) == 224


def test_a_model_of_any_size_has_as_many_pixels_as_its_square_frames_unless_asked() -> None:
    any_size = card(frame_limits=LIMITS)
    usual, asked = any_size.frame_size(8), any_size.frame_size(8, 5000)
    assert isinstance(usual, PixelLimits) and usual.max_pixels == 224 * 224
    assert isinstance(asked, PixelLimits) and asked.max_pixels == 5000
    most = any_size.frame_size(8, 10**9)
    assert isinstance(most, PixelLimits) and most.max_pixels == LIMITS.max_pixels


def test_stats_name_no_preemptions_where_there_were_none() -> None:
    assert EngineStats(0, 0, 0, 0, 0, 0).num_preemptions == {}


def test_processes_without_torch_read_cards() -> None:
    program = "import dycoke_core.engine_card, sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"
