"""Lossless compression of frames on their way through Redis: bytes saved and CPU time spent.

    python -m loadtest.frame_compression [--turns 5] [--json]

Reads 32 frames of 384x384 pixels of the bundled clip and of a clip with grain (that of
`loadtest.reading`), as the service does, then compresses and decompresses their pixels by turns:
zlib at level 1, zstd at levels 1 and 3, lz4, each of the pixels as they are and of each pixel's
difference to its left neighbour (PNG's filter "Sub"). `copy` is one copy of the pixels in memory,
for comparison. zstd and lz4 are left out where `zstandard` and `lz4` are not installed
(`pip install zstandard lz4`); the service needs neither.

Prints the medians of CPU milliseconds, on one thread.
"""

import argparse
import json
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import dycoke_core.tiny
from dycoke_core.video import FrameSpec, read_video_frames
from loadtest import machine, reading

SPEC = FrameSpec(num_frames=32, image_size=384)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Codec:
    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]


@dataclass(frozen=True, slots=True)
class Cost:
    num_bytes: int
    compress_ms: float
    decompress_ms: float


def codecs() -> Mapping[str, Codec]:
    found = {
        "copy": Codec(_copy, _copy),
        "zlib-1": Codec(partial(zlib.compress, level=1), zlib.decompress),
    }
    if find_spec("zstandard"):
        zstandard = import_module("zstandard")
        for level in (1, 3):
            found[f"zstd-{level}"] = Codec(
                zstandard.ZstdCompressor(level=level).compress,
                zstandard.ZstdDecompressor().decompress,
            )
    if find_spec("lz4"):
        lz4 = import_module("lz4.frame")
        found["lz4"] = Codec(lz4.compress, lz4.decompress)
    return found


def _copy(data: bytes) -> bytes:
    return bytes(memoryview(data))


def subtract_left(pixels: Pixels) -> Pixels:
    """[F, S, S, 3] → each pixel's difference to the one on its left, modulo 256."""
    filtered = pixels.copy()
    filtered[:, :, 1:] -= pixels[:, :, :-1]
    return filtered


def add_left(filtered: Pixels) -> Pixels:
    """The inverse of `subtract_left`."""
    return np.add.accumulate(filtered, axis=2, dtype=np.uint8)


def measure(pixels: Pixels, codec: Codec, *, is_filtered: bool) -> Cost:
    """Compresses and decompresses once; the result must be the pixels."""
    began_s = time.thread_time()
    packed = codec.compress((subtract_left(pixels) if is_filtered else pixels).tobytes())
    packed_s = time.thread_time()
    unpacked = np.frombuffer(codec.decompress(packed), np.uint8).reshape(pixels.shape)
    if is_filtered:
        unpacked = add_left(unpacked)
    ended_s = time.thread_time()
    assert np.array_equal(unpacked, pixels)
    return Cost(len(packed), 1000 * (packed_s - began_s), 1000 * (ended_s - packed_s))


def compare(clips: Mapping[str, Pixels], turns: int) -> list[dict[str, Any]]:
    rows = []
    for clip, pixels in clips.items():
        seen: dict[str, list[Cost]] = {}
        for _ in range(turns):
            for name, codec in codecs().items():
                for is_filtered in (False, True) if name != "copy" else (False,):
                    label = f"{name} of differences" if is_filtered else name
                    cost = measure(pixels, codec, is_filtered=is_filtered)
                    seen.setdefault(label, []).append(cost)
        rows += [_row(clip, name, costs, pixels.nbytes) for name, costs in seen.items()]
    return rows


def _row(clip: str, name: str, costs: list[Cost], raw_bytes: int) -> dict[str, Any]:
    return {
        "clip": clip,
        "codec": name,
        "bytes": costs[0].num_bytes,
        "ratio": round(costs[0].num_bytes / raw_bytes, 3),
        "compress_ms": round(statistics.median(cost.compress_ms for cost in costs), 1),
        "decompress_ms": round(statistics.median(cost.decompress_ms for cost in costs), 1),
    }


def read_clips(folder: Path) -> dict[str, Pixels]:
    bundled = Path(dycoke_core.tiny.__file__).parent / "clips" / "shapes.mp4"
    grainy = reading.make_clips(folder, [reading.UNIT_S])[reading.UNIT_S]
    return {
        name: read_video_frames(clip, SPEC).pixels
        for name, clip in {"bundled": bundled, "grain": grainy}.items()
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'clip':9}{'':24}{'bytes':>12}{'ratio':>8}{'pack ms':>10}{'unpack ms':>11}"]
    lines += [
        f"{row['clip']:9}{row['codec']:24}{row['bytes']:>12}{row['ratio']:>8.3f}"
        f"{row['compress_ms']:>10.1f}{row['decompress_ms']:>11.1f}"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.frame_compression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one line of JSON last")
    arguments = parser.parse_args()
    before = machine.describe()
    with tempfile.TemporaryDirectory(prefix="dycoke-frames-") as folder:
        rows = compare(read_clips(Path(folder)), arguments.turns)
    print(table(rows))
    if arguments.json:
        print(json.dumps({"machine": before, "rows": rows}))


if __name__ == "__main__":
    main()
