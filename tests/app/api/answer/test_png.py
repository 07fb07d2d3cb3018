"""PNG as others read it."""

import io

import numpy as np
import pytest
from PIL import Image

from app.api.answer.png import encode_png


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (64, 48)])
def test_pillow_reads_the_same_pixels(height: int, width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    with Image.open(io.BytesIO(encode_png(pixels.tobytes(), width=width, height=height))) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        assert np.array_equal(np.asarray(image), pixels)
