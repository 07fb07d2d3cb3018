"""Lists of pictures through the readers that videos go through."""

import json
from pathlib import Path

import numpy as np
import pytest

from dycoke_core.errors import (
    UnreadableFrameError,
    UnreadableVideoError,
    VideoError,
    VideoLimitError,
)
from dycoke_core.model_frames import PixelLimits
from dycoke_core.video import FrameReaders, FrameSpec, ReadLimits
from dycoke_core.video.frame_list import MAGIC, encode_index, sniff_picture
from tests.pictures import Color, frame_list, picture

COLORS: list[Color] = [(200, 10, 10), (10, 200, 10), (10, 10, 200), (90, 90, 90), (220, 220, 10)]
SIZES = [(32, 24), (64, 64), (17, 40), (128, 16), (8, 8)]


@pytest.fixture
def mixed() -> list[bytes]:
    """Five pictures of five colors, in three formats and five sizes."""
    kinds = ["JPEG", "PNG", "WEBP", "JPEG", "PNG"]
    return [picture(*each) for each in zip(kinds, SIZES, COLORS, strict=True)]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


async def test_pictures_of_all_formats_and_sizes_become_frames_of_one_size(
    mixed: list[bytes], readers: FrameReaders, tmp_path: Path
) -> None:
    path = write(tmp_path / "list", frame_list(mixed, fps=4.0))
    probe = await readers.probe(path)
    assert (probe.container, probe.num_frames, probe.fps, probe.duration_s) == (
        "frames",
        5,
        4,
        1.25,
    )
    assert (probe.width, probe.height) == (32, 24)  # the first one's
    frames = await readers.read(path, FrameSpec(5, 16))
    assert frames.indices == (0, 1, 2, 3, 4) and frames.warnings == ()
    assert frames.timestamps_s == (0.0, 0.25, 0.5, 0.75, 1.0)
    for pixels, color in zip(frames.pixels, COLORS, strict=True):
        assert pixels.shape == (16, 16, 3)
        assert np.abs(pixels.astype(int) - color).max() <= 4  # what JPEG makes of it


async def test_a_picture_fills_the_frame_whatever_its_shape(
    readers: FrameReaders, tmp_path: Path
) -> None:
    """As a video's frames do: nothing is cut off and no border is added."""
    path = write(tmp_path / "list", frame_list([picture("PNG", (128, 16), (255, 0, 0))]))
    frames = await readers.read(path, FrameSpec(1, 32))
    assert (frames.pixels[0].reshape(-1, 3) == frames.pixels[0, 0, 0]).all()


async def test_for_models_of_any_size_frames_keep_the_first_picture_s_shape(
    readers: FrameReaders, tmp_path: Path
) -> None:
    pictures = [picture("PNG", (224, 112), (255, 0, 0)), picture("JPEG", (56, 56), (255, 0, 0))]
    path = write(tmp_path / "list", frame_list(pictures))
    limits = PixelLimits(multiple=28, min_pixels=28 * 28, max_pixels=112 * 112)
    frames = await readers.read(path, FrameSpec(2, limits))
    assert frames.pixels.shape == (2, 56, 140, 3)


async def test_more_pictures_than_wanted_are_sampled_and_fewer_repeat(
    mixed: list[bytes], readers: FrameReaders, tmp_path: Path
) -> None:
    path = write(tmp_path / "list", frame_list(mixed))
    assert (await readers.read(path, FrameSpec(3, 8))).indices == (0, 2, 4)
    many = await readers.read(path, FrameSpec(8, 8, sampling="keyframe"))
    assert many.indices == (0, 0, 1, 1, 2, 2, 3, 4)
    assert (many.pixels[0] == many.pixels[1]).all()


async def test_a_clip_of_a_list_goes_by_its_rate(
    mixed: list[bytes], readers: FrameReaders, tmp_path: Path
) -> None:
    path = write(tmp_path / "list", frame_list(mixed, fps=1.0))
    assert (await readers.read(path, FrameSpec(3, 8, start_s=1.0, end_s=4.0))).indices == (1, 2, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damage", ["cut", "noise", "head alone"])
async def test_a_picture_that_does_not_decode_is_named(
    kind: str, damage: str, mixed: list[bytes], readers: FrameReaders, tmp_path: Path
) -> None:
    good = picture(kind, (64, 64))
    bad = {
        "cut": good[:20],
        "noise": good[:12] + bytes(range(256)) * 2,
        "head alone": good[:12],
    }[damage]
    path = write(tmp_path / "list", frame_list([*mixed[:2], bad, mixed[3]]))
    with pytest.raises(UnreadableFrameError, match="frame 2") as caught:
        await readers.probe(path)
    assert caught.value.number == 2


async def test_a_picture_of_too_many_pixels_is_refused(tmp_path: Path) -> None:
    readers = FrameReaders(ReadLimits(max_pixels=64 * 64), max_readers=1)
    try:
        small = write(tmp_path / "small", frame_list([picture(size=(60, 60))] * 2))
        assert (await readers.probe(small)).num_frames == 2
        for kind in ("JPEG", "PNG", "WEBP"):
            large = frame_list([picture(), picture(kind, (640, 480))])
            with pytest.raises(VideoError, match=r"frame 1|640x480"):
                await readers.probe(write(tmp_path / "large", large))
    finally:
        await readers.aclose()


async def test_a_list_that_lasts_too_long_is_refused(readers: FrameReaders, tmp_path: Path) -> None:
    path = write(tmp_path / "list", frame_list([picture()] * 2, fps=0.0001))
    with pytest.raises(VideoLimitError, match="lasts"):
        await readers.probe(path)


GOOD = frame_list([picture()])
END = len(GOOD) - len(encode_index([(16, len(picture()))], 2.0))


def with_index(index: object) -> bytes:
    text = json.dumps(index).encode()
    return MAGIC + picture() + text + len(text).to_bytes(4, "little")


@pytest.mark.parametrize(
    "data",
    [
        MAGIC,
        MAGIC + b"\xff" * 4,
        GOOD[:-1],
        GOOD + b"\0",
        GOOD[:-4] + (10**6).to_bytes(4, "little"),
        with_index([]),
        with_index({"version": 2, "fps": 2.0, "pictures": [[16, 10]]}),
        with_index({"version": 1, "fps": 0, "pictures": [[16, 10]]}),
        with_index({"version": 1, "fps": "2", "pictures": [[16, 10]]}),
        with_index({"version": 1, "fps": 2.0, "pictures": []}),
        with_index({"version": 1, "fps": 2.0, "pictures": [[16, 10]] * 1025}),
        with_index({"version": 1, "fps": 2.0, "pictures": [[0, 10]]}),
        with_index({"version": 1, "fps": 2.0, "pictures": [[16, 10**9]]}),
        with_index({"version": 1, "fps": 2.0, "pictures": [[16, -1]]}),
        with_index({"version": 1, "fps": 2.0, "pictures": [[16]]}),
        with_index({"version": 1, "fps": 2.0, "pictures": 7}),
    ],
)
async def test_a_file_that_nobody_of_us_wrote_is_unreadable(
    data: bytes, readers: FrameReaders, tmp_path: Path
) -> None:
    with pytest.raises((UnreadableVideoError, UnreadableFrameError)):
        await readers.probe(write(tmp_path / "list", data))
    assert readers.num_exceptions == 0


@pytest.mark.parametrize(
    ("head", "codec"),
    [
        (picture("JPEG"), "mjpeg"),
        (picture("PNG"), "png"),
        (picture("WEBP"), "webp"),
        (b"GIF89a" + bytes(20), None),
        (b"RIFF\x24\x00\x00\x00AVI LIST", None),
        (b"<svg xmlns=''></svg>", None),
        (b"", None),
    ],
)
def test_pictures_are_recognised_by_their_first_bytes(head: bytes, codec: str | None) -> None:
    assert sniff_picture(head[:12]) == codec
