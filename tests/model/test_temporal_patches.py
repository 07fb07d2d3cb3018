"""Patches of several frames, against a loop over every pixel; and the frames that are taken."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dycoke_core.errors import InvalidRequestError
from dycoke_core.model.adapter import Clip
from dycoke_core.model.temporal_patches import TemporalPatches
from dycoke_core.model_frames import PixelLimits
from dycoke_core.sequence import FrameTiming

SETTINGS: dict[str, Any] = {
    "patch_size": 2,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 16, "longest_edge": 96},
}
CPU = torch.device("cpu")


def patches(*, limits_whole_video: bool = False, **changed: Any) -> TemporalPatches:
    return TemporalPatches.of_processor(SETTINGS | changed, limits_whole_video=limits_whole_video)


def slow_patches(frames: Tensor) -> Tensor:
    """Row after row of blocks of 2 x 2 patches; of a patch the colours, then times, then pixels."""
    num_frames, height, width, _ = frames.shape
    mean, std = torch.tensor(SETTINGS["image_mean"]), torch.tensor(SETTINGS["image_std"])
    pixels = (frames.float() / 255 - mean) / std
    found = []
    for unit in range(num_frames // 2):
        for block_row in range(height // 4):
            for block_column in range(width // 4):
                for place in range(4):
                    top = 4 * block_row + 2 * (place // 2)
                    left = 4 * block_column + 2 * (place % 2)
                    patch = pixels[2 * unit : 2 * unit + 2, top : top + 2, left : left + 2]
                    found.append(patch.permute(3, 0, 1, 2).flatten())
    return torch.stack(found)


def test_patches_are_those_of_the_loop() -> None:
    frames = torch.randint(0, 256, (4, 8, 12, 3), generator=torch.Generator().manual_seed(0))
    made = patches()
    found = made(frames.to(torch.uint8), torch.float32, made.constants(CPU))
    assert found.shape == (2 * 4 * 6, 3 * 2 * 2 * 2)
    torch.testing.assert_close(found, slow_patches(frames), atol=1e-5, rtol=1e-5)


def test_a_processors_older_names_of_its_limits_come_first() -> None:
    assert patches().limits == PixelLimits(multiple=4, min_pixels=16, max_pixels=96)
    older = patches(min_pixels=20, max_pixels=200, rescale_factor=None)
    assert (older.limits.min_pixels, older.limits.max_pixels) == (20, 200)
    assert older.rescale_factor == pytest.approx(1 / 255)
    whole = patches(limits_whole_video=True)
    assert whole.limits.frames_per_unit == 2


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 8, 8, 3), "F of at least 1"),
        ((2, 8, 8), "F of at least 1"),
        ((2, 8, 8, 4), "F of at least 1"),
        ((2, 6, 8, 3), "multiples of 4"),
        ((2, 8, 0, 3), "multiples of 4"),
        ((2, 12, 12, 3), "at most 96 pixels each"),
    ],
)
def test_frames_that_are_not_the_models_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        patches().clip(shape, None)


def test_a_budget_of_a_whole_video_counts_whole_units() -> None:
    whole = patches(limits_whole_video=True)
    assert whole.clip((2, 4, 8, 3), None) == Clip(2, 4, 8, None)
    with pytest.raises(InvalidRequestError, match="at most 96 pixels together"):
        whole.clip((3, 4, 8, 3), None)  # the last unit lacks a frame and counts as two


def test_times_are_one_for_each_frame() -> None:
    timing = FrameTiming((0.0, 0.5, 1.0), duration_s=1.5)
    assert patches().clip((3, 8, 8, 3), timing).timing == timing
    with pytest.raises(InvalidRequestError, match="a time for each frame"):
        patches().clip((2, 8, 8, 3), timing)


@pytest.mark.parametrize(("num_frames", "num_units"), [(1, 1), (2, 1), (3, 2), (32, 16)])
def test_a_last_unit_may_lack_a_frame(num_frames: int, num_units: int) -> None:
    assert patches().num_units(num_frames) == num_units


def test_a_units_tokens_stand_in_rows_and_columns() -> None:
    assert patches().grid(8, 12) == (4, 6)
    assert patches().token_grid(8, 12) == (2, 3)


def test_a_clip_without_times_has_24_frames_a_second() -> None:
    assert patches().seconds_per_unit(Clip(4, 8, 8)) == pytest.approx(2 / 24)
    timing = FrameTiming((0.0, 0.5, 1.0, 1.5), duration_s=2.0)
    assert patches().seconds_per_unit(Clip(4, 8, 8, timing)) == pytest.approx(1.0)
