"""Sizes of frames by a pixel budget, against transformers' rules."""

import ast
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from dycoke_core.errors import InvalidRequestError
from dycoke_core.model_frames import PixelLimits, frame_size

LIMITS = PixelLimits(multiple=28, min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28)


@settings(deadline=None)
@given(height=st.integers(1, 4320), width=st.integers(1, 4320))
def test_sizes_are_transformers(height: int, width: int) -> None:
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(InvalidRequestError, match="200 times"):
            LIMITS.fit(height, width, num_frames=1)
        return
    expected = smart_resize(
        height, width, factor=28, min_pixels=LIMITS.min_pixels, max_pixels=LIMITS.max_pixels
    )
    assert LIMITS.fit(height, width, num_frames=1) == expected


def smart_resize_of(module: str) -> Callable[..., tuple[int, int]]:
    """A processor's rule, from the source: importing the module may need torchvision."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    (rule,) = (
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "smart_resize"
    )
    names: dict[str, Any] = {"math": math}
    exec(compile(ast.Module([rule], []), spec.origin, "exec"), names)
    return names["smart_resize"]  # type: ignore[no-any-return]


smart_resize_of_video = smart_resize_of("transformers.models.qwen3_vl.video_processing_qwen3_vl")
OF_VIDEO = PixelLimits(multiple=32, min_pixels=4096, max_pixels=25165824, frames_per_unit=2)


@settings(deadline=None)
@given(height=st.integers(16, 4320), width=st.integers(16, 4320), num_frames=st.integers(2, 768))
def test_sizes_by_a_videos_budget_are_transformers(
    height: int, width: int, num_frames: int
) -> None:
    limits = {"min_pixels": OF_VIDEO.min_pixels, "max_pixels": OF_VIDEO.max_pixels}
    try:
        expected = smart_resize_of_video(num_frames, height, width, factor=32, **limits)
    except ValueError:
        with pytest.raises(InvalidRequestError, match="200 times"):
            OF_VIDEO.fit(height, width, num_frames=num_frames)
        return
    fitted = OF_VIDEO.fit(height, width, num_frames=num_frames)
    num_taken = num_frames + num_frames % 2
    if num_taken * math.prod(expected) <= OF_VIDEO.max_pixels:
        assert fitted == expected
    else:  # an odd number that the rule rounds down, or a side that cannot get shorter
        assert num_taken * math.prod(fitted) <= OF_VIDEO.max_pixels


@settings(deadline=None)
@given(
    height=st.integers(16, 4320),
    width=st.integers(16, 4320),
    num_frames=st.integers(1, 1024),
    max_pixels=st.integers(32 * 32, 2048 * 2048),
)
def test_no_frame_has_more_than_was_asked_however_many_there_are(
    height: int, width: int, num_frames: int, max_pixels: int
) -> None:
    if max(height, width) > 100 * min(height, width):
        return
    budget = OF_VIDEO.within(max_pixels, num_frames=num_frames)
    fitted = budget.fit(height, width, num_frames=num_frames)
    assert math.prod(fitted) <= max_pixels
    assert OF_VIDEO.count(*fitted, num_frames) <= OF_VIDEO.max_pixels


@pytest.mark.parametrize("num_frames", [5, 9, 13])
def test_a_number_that_halves_round_down_keeps_the_budget_too(num_frames: int) -> None:
    """Of five frames transformers' rule counts four, where the model takes six."""
    limits = {"min_pixels": OF_VIDEO.min_pixels, "max_pixels": num_frames * 448 * 448}
    theirs = smart_resize_of_video(num_frames, 1000, 1000, factor=32, **limits)
    assert (num_frames + 1) * math.prod(theirs) > num_frames * 448 * 448
    budget = OF_VIDEO.within(448 * 448, num_frames=num_frames)
    assert budget.fit(1000, 1000, num_frames=num_frames) == (448, 448)


def test_a_smaller_budget_makes_smaller_frames() -> None:
    assert LIMITS.fit(1080, 1920, num_frames=4) == (560, 1008)
    smaller = LIMITS.within(256 * 28 * 28, num_frames=4)
    assert smaller.fit(1080, 1920, num_frames=4) == (336, 588)
    assert LIMITS.within(4 * 28 * 28, num_frames=1).fit(1080, 1920, num_frames=1) == (28, 56)


def test_no_budget_exceeds_the_models() -> None:
    assert LIMITS.within(10**9, num_frames=4) == LIMITS
    assert OF_VIDEO.within(10**9, num_frames=64) == OF_VIDEO


def test_a_budget_is_of_each_frame_where_limits_are_of_the_video() -> None:
    budget = OF_VIDEO.within(448 * 448, num_frames=32)
    assert budget.max_pixels == 32 * 448 * 448
    assert budget.fit(720, 1280, num_frames=32) == (320, 576)
    # Of many frames each gets less.
    many = OF_VIDEO.within(448 * 448, num_frames=256)
    assert many.fit(720, 1280, num_frames=256) == (224, 416)


def test_models_of_one_size_have_no_budget() -> None:
    assert frame_size(384, None, 32, 10**6) == 384
    assert frame_size(392, LIMITS, 32) == LIMITS.within(392 * 392, num_frames=32)
    assert frame_size(392, LIMITS, 32, 200_000) == LIMITS.within(200_000, num_frames=32)
