import math

import pytest

from dycoke_core.errors import InvalidRequestError
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
