"""Pictures for the tests, as files hold them."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dycoke_core.video.frame_list import MAGIC, encode_index

Color = tuple[int, int, int]
_PATCH = 9  # pixels per side: chroma, which is stored for two, has hardly an edge where luma has


def picture(
    kind: str = "PNG", size: tuple[int, int] = (32, 24), color: Color = (9, 99, 199)
) -> bytes:
    """A plain one; size: width and height."""
    file = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.new("RGB", size, color).save(file, kind, **options)
    return file.getvalue()


def painted(height: int, width: int, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    """RGB [height, width, 3]: small patches of any colours, with sharp edges between them."""
    size = (-(-height // _PATCH), -(-width // _PATCH), 3)
    patches = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return patches.repeat(_PATCH, 0).repeat(_PATCH, 1)[:height, :width]


def saved(pixels: npt.NDArray[np.uint8] | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Args: pixels: RGB [height, width, 3], or a picture of any kind; options: Pillow's."""
    file = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(file, kind, **options)
    return file.getvalue()


def frame_list(pictures: Sequence[bytes], fps: float = 2.0) -> bytes:
    """A file as uploads of lists leave it."""
    places, offset = [], len(MAGIC)
    for data in pictures:
        places.append((offset, len(data)))
        offset += len(data)
    return MAGIC + b"".join(pictures) + encode_index(places, fps)
