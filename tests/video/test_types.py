import math

import pytest

from dycoke_core.errors import InvalidRequestError
from dycoke_core.model_frames import PixelLimits
from dycoke_core.video import FrameSpec


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": 100_000}, "num_frames"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": 100_000}, "image_size"),
        ({"start_s": -1.0}, "start_s"),
        ({"start_s": math.nan}, "start_s"),
        ({"end_s": math.inf}, "end_s"),
        ({"end_s": 0.0}, "end_s"),
        ({"sampling": "keyframes"}, "sampling"),
        ({"start_s": 2.0, "end_s": 2.0}, "end_s"),
    ],
)
def test_a_spec_out_of_range_is_refused_by_name(values: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        FrameSpec(**{"num_frames": 8, "image_size": 384, **values})  # type: ignore[arg-type]


def test_frames_have_the_models_size_or_the_videos_shape() -> None:
    limits = PixelLimits(multiple=28, min_pixels=28 * 28, max_pixels=392 * 392)
    assert FrameSpec(8, 384).shape(720, 1280) == (8, 384, 384, 3)
    assert FrameSpec(8, limits).shape(720, 1280) == (8, 280, 504, 3)
    assert FrameSpec(8, limits).shape(1280, 720) == (8, 504, 280, 3)


def test_frames_that_are_too_many_bytes_together_are_refused() -> None:
    limits = PixelLimits(multiple=28, min_pixels=28 * 28, max_pixels=4 * 10**6)
    spec = FrameSpec(1024, limits)
    spec.shape(280, 280)
    with pytest.raises(InvalidRequestError, match=r"num_frames 1024 of 1260 x 700 pixels"):
        spec.shape(700, 1260)
