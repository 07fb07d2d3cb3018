"""A list of pictures as one medium: how it lies in a file. Standard library only.

    MAGIC | the pictures, as they came | index: JSON | length of the index: 4 bytes, little endian

Written as the pictures come in, whose sizes are not known before. Nothing in such a file may be
trusted: it is read in the readers' sandbox.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MAGIC = b"\x89DYCOKE-FRAMES\r\n"
INDEX_VERSION = 1
PICTURE_HEAD_BYTES = 12  # enough to recognise a picture
MAX_PICTURES = 1024
DEFAULT_FPS = 2.0  # of a list that does not say, as DashScope has it

_LENGTH_BYTES = 4
_MAX_INDEX_BYTES = 64 * MAX_PICTURES

# FFmpeg's names of the decoders. The values are public (in probes).
PictureCodec = Literal["mjpeg", "png", "webp"]


@dataclass(frozen=True, slots=True)
class FrameListIndex:
    """Where the pictures lie, in the order in which they are shown.

    Args:
        fps: of the list: picture i is shown at i / fps seconds.
    """

    places: tuple[tuple[int, int], ...]  # offset and bytes of each
    fps: float

    @property
    def times_s(self) -> list[float]:
        return [number / self.fps for number in range(len(self.places))]

    @property
    def end_s(self) -> float:
        return len(self.places) / self.fps


def sniff_picture(head: bytes) -> PictureCodec | None:
    """What a picture that starts with `head` is, None for all that are not taken.

    Args:
        head: its first `PICTURE_HEAD_BYTES`, or all of a shorter one.
    """
    if head.startswith(b"\xff\xd8\xff"):
        return "mjpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    return None


def encode_index(places: Sequence[tuple[int, int]], fps: float) -> bytes:
    """What ends the file.

    Args:
        places: offset and bytes of each picture, in the order in which they are shown.
    """
    index = {"version": INDEX_VERSION, "fps": float(fps), "pictures": places}
    text = json.dumps(index, separators=(",", ":")).encode()
    return text + len(text).to_bytes(_LENGTH_BYTES, "little")


def read_index(fd: int) -> FrameListIndex:
    """Raises: ValueError, whatever is wrong with the file."""
    size = os.fstat(fd).st_size
    end = size - _LENGTH_BYTES
    length = int.from_bytes(os.pread(fd, _LENGTH_BYTES, max(end, 0)), "little")
    start = end - length
    if length > _MAX_INDEX_BYTES or start < len(MAGIC):
        raise ValueError("no index")
    index = json.loads(os.pread(fd, length, start))
    if not isinstance(index, dict) or index.get("version") != INDEX_VERSION:
        raise ValueError("an index of another version")
    places, fps = index.get("pictures"), index.get("fps")
    if not isinstance(places, list) or not 1 <= len(places) <= MAX_PICTURES:
        raise ValueError("no pictures, or too many")
    if not isinstance(fps, int | float) or not 0 < fps < 1e9:
        raise ValueError("no frame rate")
    return FrameListIndex(tuple(_place(place, start) for place in places), float(fps))


def _place(place: object, end: int) -> tuple[int, int]:
    match place:
        case [int(offset), int(size)] if len(MAGIC) <= offset and 0 < size <= end - offset:
            return offset, size
    raise ValueError("a picture outside the file")
