"""Pictures for the tests, as files hold them."""

import io
from collections.abc import Sequence

from PIL import Image

from dycoke_core.video.frame_list import MAGIC, encode_index

Color = tuple[int, int, int]


def picture(
    kind: str = "PNG", size: tuple[int, int] = (32, 24), color: Color = (9, 99, 199)
) -> bytes:
    """A plain one; size: width and height."""
    file = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.new("RGB", size, color).save(file, kind, **options)
    return file.getvalue()


def frame_list(pictures: Sequence[bytes], fps: float = 2.0) -> bytes:
    """A file as uploads of lists leave it."""
    places, offset = [], len(MAGIC)
    for data in pictures:
        places.append((offset, len(data)))
        offset += len(data)
    return MAGIC + b"".join(pictures) + encode_index(places, fps)
