"""Both readers give the same pixels for the same file: a fallback changes no answer."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from dycoke_core.model_frames import PixelLimits
from dycoke_core.video import Container, FrameReaders, FrameSpec, ReadLimits, VideoFrames
from tests.video_clips import frame_numbers, make_clip

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOLERANCE = 2  # levels of 255

CLIPS: dict[str, dict[str, Any]] = {
    "plain.mp4": {},
    "large.mp4": {"width": 1280, "height": 720},
    "upright.mp4": {"width": 128, "height": 320},
    "odd.webm": {"codec": "libvpx-vp9", "width": 321, "height": 179},
    "odd-420.mp4": {"width": 322, "height": 178},
    "bt601.mp4": {"options": {"x264-params": "colormatrix=smpte170m"}},
    "bt709.mp4": {"options": {"x264-params": "colormatrix=bt709:colorprim=bt709"}},
    "bt2020.mkv": {"options": {"x264-params": "colormatrix=bt2020nc"}},
    "full.mp4": {"options": {"x264-params": "fullrange=on"}},
    "full-709.mp4": {"options": {"x264-params": "fullrange=on:colormatrix=bt709"}},
    "full-jpeg.mkv": {"codec": "mjpeg"},
    "hevc-10-bit.mkv": {"codec": "libx265", "pix_fmt": "yuv420p10le"},
    "4-2-2.mkv": {"pix_fmt": "yuv422p"},
    "4-4-4.mkv": {"pix_fmt": "yuv444p"},
    "av1.mp4": {"codec": "libsvtav1"},
    "vp8.webm": {"codec": "libvpx"},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "turned-90.mp4": {"rotation": 90},
    "turned-180.mp4": {"rotation": 180},
    "turned-270.mp4": {"rotation": 270},
    "turned-odd.mp4": {"rotation": 90, "width": 322, "height": 178},
    "turned-4-2-2.mp4": {"rotation": 270, "pix_fmt": "yuv422p"},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def readers() -> AsyncIterator[FrameReaders]:
    readers = FrameReaders(ReadLimits(), max_readers=2)
    yield readers
    await readers.aclose()


async def read_by_both(
    readers: FrameReaders, path: Path, spec: FrameSpec, monkeypatch: pytest.MonkeyPatch
) -> tuple[VideoFrames, VideoFrames]:
    by_reader = []
    for containers in (frozenset(Container), frozenset[Container]()):
        monkeypatch.setattr("dycoke_core.video.frame_readers.FOR_DECORD", containers)
        by_reader.append(await readers.read(path, spec))
    first, second = by_reader
    assert (first.reader, second.reader) == ("decord", "pyav")
    assert (first.indices, first.timestamps_s) == (second.indices, second.timestamps_s)
    return first, second


def difference(first: VideoFrames, second: VideoFrames) -> int:
    return int(np.abs(first.pixels.astype(int) - second.pixels.astype(int)).max())


@pytest.mark.parametrize("name", CLIPS)
async def test_both_readers_give_the_same_pixels(
    readers: FrameReaders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = make_clip(tmp_path / name, num_frames=40, **CLIPS[name])
    first, second = await read_by_both(readers, path, FrameSpec(5, 112), monkeypatch)
    assert difference(first, second) <= TOLERANCE
    if "turned" not in name:
        assert frame_numbers(second.pixels) == list(second.indices)


@pytest.mark.parametrize("image_size", [1, 16, 32, 48, 64, 96, 224, 336, 384, 448])
async def test_at_every_size(
    readers: FrameReaders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_size: int
) -> None:
    """For several of these decord reports frames of four channels or more."""
    path = make_clip(tmp_path / "clip.mp4", num_frames=10)
    first, second = await read_by_both(readers, path, FrameSpec(3, image_size), monkeypatch)
    assert difference(first, second) <= TOLERANCE
    assert sum(readers.kills.values()) == 0


SHAPES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "wide.mp4": ({"width": 640, "height": 360}, (84, 140)),
    "upright.mp4": ({"width": 128, "height": 320}, (168, 56)),
    "turned-90.mp4": ({"width": 640, "height": 360, "rotation": 90}, (140, 84)),
    "turned-180.mp4": ({"width": 640, "height": 360, "rotation": 180}, (84, 140)),
    "turned-270.mp4": ({"width": 640, "height": 360, "rotation": 270}, (140, 84)),
    "odd.webm": ({"codec": "libvpx-vp9", "width": 321, "height": 179}, (56, 140)),
}


@pytest.mark.parametrize("name", SHAPES)
async def test_frames_that_keep_their_shape_are_the_same_by_both_readers(
    readers: FrameReaders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made, size = SHAPES[name]
    path = make_clip(tmp_path / name, num_frames=12, **made)
    limits = PixelLimits(multiple=28, min_pixels=28 * 28, max_pixels=112 * 112)
    first, second = await read_by_both(readers, path, FrameSpec(4, limits), monkeypatch)
    assert first.pixels.shape == second.pixels.shape == (4, *size, 3)
    assert difference(first, second) <= TOLERANCE
    if "turned" not in name:
        assert frame_numbers(first.pixels) == list(first.indices)


async def test_colours_are_read_by_the_matrix_and_the_range_that_the_file_names(
    readers: FrameReaders, tmp_path: Path
) -> None:
    """Otherwise the test above could hold for two readers that are wrong alike."""
    pixels = {}
    for name in ("plain.mp4", "full.mp4", "bt709.mp4"):
        path = make_clip(tmp_path / name, num_frames=2, **CLIPS[name])
        frames = await readers.read(path, FrameSpec(1, 112, start_s=0.04))
        pixels[name] = frames.pixels.astype(int)
    # The encoder was given the same luma, from 16 to 235: in the full range that white is a grey.
    white, black = (0, 65, 5), (0, 65, 50)  # in the row of blocks that shows the frame's number
    assert pixels["plain.mp4"][white].min() >= 250
    assert pixels["plain.mp4"][black].max() <= 5
    assert abs(pixels["full.mp4"][white] - 235).max() <= 5
    assert abs(pixels["full.mp4"][black] - 16).max() <= 5
    assert abs(pixels["bt709.mp4"] - pixels["plain.mp4"]).max() > 5
