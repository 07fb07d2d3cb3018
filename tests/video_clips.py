"""Clips made for tests with PyAV, whose wheel carries the encoders.

Each frame shows its own number as a row of black and white blocks, so that a test can ask which
frame it was given: `frame_number`. `seed` changes everything else.
"""

import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 prints to the terminal otherwise

Pixels = npt.NDArray[np.uint8]

_NUM_BITS = 12
_RATE = 48000  # of sound
_FAST: dict[str, dict[str, str]] = {
    "libx264": {"preset": "veryfast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=none"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "12"},
}


def make_clip(
    path: Path,
    *,
    codec: str = "libx264",
    container: str | None = None,
    width: int = 192,
    height: int = 128,
    num_frames: int = 60,
    fps: int = 25,
    seed: int = 0,
    rotation: int = 0,
    pts: Sequence[int] | None = None,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    sound: str | None = None,
) -> Path:
    """Encodes a clip and returns its path.

    Args:
        container: FFmpeg's name; by default what the file's name says.
        rotation: degrees, counter-clockwise, as metadata.
        pts: presentation times in units of 1/1000 s, for a variable frame rate.
        sound: FFmpeg's name of an encoder, for silence beside the picture.
        options: of the encoder, beside those that make it fast.
    """
    with av.open(str(path), "w", format=container, options=container_options or {}) as output:
        stream: Any = output.add_stream(
            codec, rate=fps, options=_FAST.get(codec, {}) | (options or {})
        )
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        voice = None if sound is None else output.add_stream(sound, rate=_RATE, layout="mono")
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(clip_frame(number, width, height, seed), "rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[number], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        if voice is not None:
            output.mux(_silence(voice, num_frames / fps))
    return path


def make_audio(path: Path, seconds: float = 1.0) -> Path:
    """A file with sound and no picture."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=_RATE, layout="mono")
        output.mux(_silence(stream, seconds))
    return path


def make_flat_clip(
    path: Path,
    *,
    width: int,
    height: int,
    num_frames: int = 2,
    options: dict[str, str] | None = None,
) -> Path:
    """A clip of one colour, whose encoding costs little at any size."""
    with av.open(str(path), "w") as output:
        fast = {"preset": "ultrafast", **(options or {})}
        stream: Any = output.add_stream("libx264", rate=25, options=fast)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame(width, height, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes([90]) * plane.buffer_size)
        for number in range(num_frames):
            frame.pts, frame.time_base = number, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def clip_frame(number: int, width: int, height: int, seed: int = 0) -> Pixels:
    """Returns frame `number` of a clip, RGB [height, width, 3]."""
    tint = np.random.default_rng(seed).integers(60, 200, 3)
    y, x = np.mgrid[0:height, 0:width]
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0] = tint[0] * x // width
    image[..., 1] = tint[1] * y // height
    image[..., 2] = (tint[2] + 3 * number) % 200
    side = height // 6
    left = (5 * number) % (width - side)
    image[side : 2 * side, left : left + side] = 255 - tint
    for bit in range(_NUM_BITS):
        columns = slice(bit * width // _NUM_BITS, (bit + 1) * width // _NUM_BITS)
        image[height // 2 : height * 2 // 3, columns] = 255 if number >> bit & 1 else 0
    return image


def frame_number(pixels: Pixels) -> int:
    """Reads the number out of a frame of any size."""
    height, width, _ = pixels.shape
    row = pixels[int(height * 0.583)].mean(axis=-1)
    centres = [int((bit + 0.5) * width / _NUM_BITS) for bit in range(_NUM_BITS)]
    return sum(1 << bit for bit, centre in enumerate(centres) if row[centre] > 128)


def frame_numbers(frames: Iterable[Pixels]) -> list[int]:
    return [frame_number(frame) for frame in frames]


def _silence(stream: Any, seconds: float) -> list[Any]:
    packets: list[Any] = []
    for number in range(int(seconds * _RATE / 1024)):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = _RATE, number * 1024
        packets += stream.encode(frame)
    return [*packets, *stream.encode()]
