"""How frames are resized: the two ways, against whole frames and Pillow's filters.

Whole frames are decord's, which the models' own code reads them with. Frames that are resized while
they are decoded stay near to that in brightness alone: FFmpeg resizes colours as they are stored,
of which 4:2:0 video has one for four pixels, and at sharp edges between colours that is visible.
"""

import io
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, get_args

import av
import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
from PIL import Image, ImageOps

from dycoke_core.model_frames import PixelLimits, Resizing
from dycoke_core.video import FrameReaders, FrameSpec, ReadLimits, VideoFrames
from dycoke_core.video.frame_resizers import frame_resizer
from tests.pictures import frame_list, painted, saved
from tests.video_clips import make_clip, make_flat_clip

pytestmark = pytest.mark.asyncio(loop_scope="module")

Pixels = npt.NDArray[np.uint8]
Clips = dict[str, tuple[Path, Pixels]]  # each with its whole frames, [F, height, width, 3]

NUM_FRAMES = 3
MADE: dict[str, dict[str, Any]] = {
    "colours.mp4": {"width": 1280, "height": 720},
    "narrow.mp4": {"width": 128, "height": 320},
    "odd.webm": {"codec": "libvpx-vp9", "width": 321, "height": 179},
    "full-range.mp4": {"options": {"x264-params": "fullrange=on"}},
    "bt709.mp4": {"options": {"x264-params": "colormatrix=bt709:colorprim=bt709"}},
    "10-bit.mkv": {"codec": "libx265", "pix_fmt": "yuv420p10le"},
    "4-2-2.mkv": {"pix_fmt": "yuv422p"},
    "4-4-4.mkv": {"pix_fmt": "yuv444p"},
    "turned-90.mp4": {"rotation": 90, "width": 640, "height": 360},
    "turned-180.mp4": {"rotation": 180, "width": 640, "height": 360},
    "turned-270.mp4": {"rotation": 270, "width": 322, "height": 178},
    "turned-4-2-2.mp4": {"rotation": 270, "pix_fmt": "yuv422p"},
}
TURNED = Image.Exif()
TURNED[0x0112] = 6  # shown a quarter clockwise
WHOLE_FRAMES = """
import json, sys, decord, numpy
for path, frames in json.loads(sys.argv[1]).items():
    video = decord.VideoReader(path, num_threads=1)
    numpy.save(frames, numpy.stack([video[number].asnumpy() for number in range(len(video))]))
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    folder = tmp_path_factory.mktemp("clips")
    paths = {
        name: make_clip(folder / name, num_frames=NUM_FRAMES, **made) for name, made in MADE.items()
    }
    paths |= {"scenery.mp4": make_scenery(folder), "patches.mp4": make_patches(folder)}
    frames = {str(path): str(path.with_suffix(".npy")) for path in paths.values()}
    subprocess.run([sys.executable, "-c", WHOLE_FRAMES, json.dumps(frames)], check=True, timeout=60)
    return {name: (path, np.load(path.with_suffix(".npy"))) for name, path in paths.items()}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def readers() -> AsyncIterator[FrameReaders]:
    readers = FrameReaders(ReadLimits(), max_readers=2)
    yield readers
    await readers.aclose()


def make_scenery(folder: Path) -> Path:
    """Grey, with the spectrum of what cameras see: the finer, the fainter."""

    def scenery(number: int, height: int, width: int) -> Pixels:
        noise = np.fft.rfft2(np.random.default_rng(number).standard_normal((height, width)))
        waves = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
        picture = np.fft.irfft2(noise / np.maximum(waves, 1 / height) ** 1.5, s=(height, width))
        grey = 128 + 45 * picture / picture.std()
        return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)

    return encode(folder / "scenery.mp4", scenery, 720, 1280)


def make_patches(folder: Path) -> Path:
    return encode(
        folder / "patches.mp4",
        lambda number, height, width: painted(height, width, seed=number),
        *(360, 640),
    )


def encode(path: Path, frame: Callable[[int, int, int], Pixels], height: int, width: int) -> Path:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(NUM_FRAMES):
            pixels = frame(number, height, width)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return path


def by_pillow(frames: Pixels, video: VideoFrames, resampling: Image.Resampling) -> Pixels:
    """Whole frames resized by Pillow, to the size of those that were read."""
    height, width = video.pixels.shape[1:3]
    resized = [
        np.asarray(Image.fromarray(frames[index]).resize((width, height), resampling))
        for index in video.indices
    ]
    return np.stack(resized)


def apart(first: Pixels, second: Pixels) -> npt.NDArray[np.int16]:
    return np.abs(first.astype(np.int16) - second.astype(np.int16))


@pytest.mark.parametrize("side", [392, 224])
async def test_resized_by_the_decoder_brightness_is_within_two_levels_of_pillows(
    side: int, clips: Clips, readers: FrameReaders
) -> None:
    path, frames = clips["scenery.mp4"]
    limits = PixelLimits(multiple=28, min_pixels=784, max_pixels=side**2)
    video = await readers.read(path, FrameSpec(NUM_FRAMES, limits))
    difference = apart(video.pixels, by_pillow(frames, video, Image.Resampling.BICUBIC))
    assert np.mean(difference <= 2) > 0.98
    assert difference.max() <= 6


@pytest.mark.parametrize("budget", [112**2, 392**2, 900**2])
@pytest.mark.parametrize("name", [*MADE, "patches.mp4"])
async def test_otherwise_they_are_what_pillow_makes_of_whole_frames(
    name: str, budget: int, clips: Clips, readers: FrameReaders
) -> None:
    path, frames = clips[name]
    limits = PixelLimits(multiple=28, min_pixels=budget // 2, max_pixels=budget)
    video = await readers.read(path, FrameSpec(NUM_FRAMES, limits, resizing="bicubic"))
    assert (video.reader, video.warnings) == ("pyav", ())
    assert (video.pixels == by_pillow(frames, video, Image.Resampling.BICUBIC)).all()


@pytest.mark.parametrize("resizing", [way for way in get_args(Resizing) if way != "decoder"])
@pytest.mark.parametrize("image_size", [1, 64, 448])
async def test_square_frames_are_resized_by_the_filter_asked_for(
    resizing: Resizing, image_size: int, clips: Clips, readers: FrameReaders
) -> None:
    path, frames = clips["patches.mp4"]
    video = await readers.read(path, FrameSpec(NUM_FRAMES, image_size, resizing=resizing))
    expected = by_pillow(frames, video, Image.Resampling[resizing.upper()])
    assert (video.pixels == expected).all()


async def test_resized_by_the_decoder_colours_are_others(
    clips: Clips, readers: FrameReaders
) -> None:
    """Otherwise nothing here would tell the two ways apart."""
    path, frames = clips["patches.mp4"]
    video = await readers.read(path, FrameSpec(NUM_FRAMES, 112))
    difference = apart(video.pixels, by_pillow(frames, video, Image.Resampling.BICUBIC))
    assert np.mean(difference <= 2) < 0.9


async def test_keyframes_are_resized_alike(clips: Clips, readers: FrameReaders) -> None:
    path, frames = clips["patches.mp4"]
    spec = FrameSpec(1, 224, sampling="keyframe", resizing="bicubic")
    video = await readers.read(path, spec)
    assert (video.pixels == by_pillow(frames, video, Image.Resampling.BICUBIC)).all()


async def test_pictures_are_resized_alike(
    clips: Clips, readers: FrameReaders, tmp_path: Path
) -> None:
    whole = [Image.fromarray(clips[name][1][0]) for name in ("patches.mp4", "odd.webm")]
    whole += [whole[1].convert("P"), whole[1].convert("L")]
    path = tmp_path / "list"
    path.write_bytes(frame_list([saved(picture, "PNG") for picture in whole]))
    spec = FrameSpec(len(whole), PixelLimits(28, 784, 224**2), resizing="bicubic")
    video = await readers.read(path, spec)
    size = video.pixels.shape[2], video.pixels.shape[1]
    for picture, read in zip(whole, video.pixels, strict=True):
        resized = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        assert (np.asarray(resized) == read).all()


@pytest.mark.parametrize("size", [(360, 640), (179, 321), (180, 319)])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"subsampling": "4:2:0"}),
        ("JPEG", {"subsampling": "4:2:2"}),
        ("JPEG", {"subsampling": "4:4:4"}),
        ("JPEG", {"subsampling": "4:2:0", "exif": TURNED}),
        ("WEBP", {}),
    ],
    ids=["4:2:0", "4:2:2", "4:4:4", "turned", "webp"],
)
async def test_photographs_are_within_two_levels_of_what_pillow_decodes_and_resizes(
    kind: str,
    options: dict[str, Any],
    size: tuple[int, int],
    readers: FrameReaders,
    tmp_path: Path,
) -> None:
    photograph = saved(painted(*size), kind, quality=90, **options)
    path = tmp_path / "list"
    path.write_bytes(frame_list([photograph]))
    limits = PixelLimits(28, 784, 392**2)
    video = await readers.read(path, FrameSpec(1, limits, resizing="bicubic"))
    decoded = ImageOps.exif_transpose(Image.open(io.BytesIO(photograph)))
    expected = by_pillow(np.asarray(decoded)[None], video, Image.Resampling.BICUBIC)
    difference = apart(video.pixels, expected)
    assert np.mean(difference <= 2) > 0.995
    assert difference.max() <= 5


async def test_no_more_whole_frames_are_held_than_one_decodes_at_a_time(tmp_path: Path) -> None:
    """Twenty-four of them as RGB would take 600 MB."""
    path = make_flat_clip(tmp_path / "uhd.mp4", width=3840, height=2160, num_frames=24)
    small = FrameReaders(ReadLimits(memory_bytes=512 * 2**20), max_readers=1, num_cores=2)
    try:
        video = await small.read(path, FrameSpec(24, 112, resizing="bicubic"))
    finally:
        await small.aclose()
    assert video.indices == tuple(range(24)) and video.warnings == ()
    assert len(np.unique(video.pixels.reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize(
    ("pix_fmt", "across", "down"),
    [("yuvj411p", 4, 1), ("yuvj420p", 2, 2), ("yuvj422p", 2, 1), ("yuvj440p", 1, 2)],
)
@pytest.mark.parametrize("short", [1, 2, 3])
async def test_colours_stay_where_the_last_ones_are_stored_for_missing_pixels(
    pix_fmt: str, across: int, down: int, short: int
) -> None:
    """A picture that ends within a colour's pixels is the start of one that has all of them."""
    whole = coloured(pix_fmt, 64, 48)
    part = coloured(pix_fmt, 64 - short % across, 48 - short % down)
    resizers = [
        frame_resizer("bicubic", picture.height, picture.width, of_pictures=True)
        for picture in (whole, part)
    ]
    expected, pixels = (resize(f) for resize, f in zip(resizers, (whole, part), strict=True))
    assert (pixels == expected[: part.height, : part.width]).all()
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def coloured(pix_fmt: str, width: int, height: int) -> av.VideoFrame:
    """The same bytes at the same places, whatever the size."""
    picture = av.VideoFrame(width, height, pix_fmt)
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8)
    for plane, values in zip(picture.planes, noise, strict=True):
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        rows[: plane.height, : plane.width] = values[: plane.height, : plane.width]
    return picture
