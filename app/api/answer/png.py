"""A frame as PNG, for a browser. Standard library only: the API has no imaging package."""

import struct
import zlib

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB, _EIGHT_BITS = 2, 8


def encode_png(pixels: bytes, *, width: int, height: int) -> bytes:
    """
    Args:
        pixels: uint8 [height, width, 3], RGB.

    Source: PNG specification (ISO/IEC 15948), sections 5 and 11; every row unfiltered.
    """
    stride = 3 * width
    assert len(pixels) == stride * height
    rows = (pixels[start : start + stride] for start in range(0, len(pixels), stride))
    header = struct.pack(">IIBBBBB", width, height, _EIGHT_BITS, _RGB, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"".join(
        (_SIGNATURE, _chunk(b"IHDR", header), _chunk(b"IDAT", data), _chunk(b"IEND", b""))
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
