"""Sampling by keyframe: those frames, at their own times, without decoding any other."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from dycoke_core.video import FrameReaders, FrameSpec, ReadLimits
from tests.video_clips import frame_numbers, make_clip

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVERY_TEN: dict[str, Any] = {"g": "10", "keyint_min": "10", "sc_threshold": "0"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def readers() -> AsyncIterator[FrameReaders]:
    readers = FrameReaders(ReadLimits(), max_readers=2)
    yield readers
    await readers.aclose()


def by_keyframe(num_frames: int, **clip: float) -> FrameSpec:
    return FrameSpec(num_frames, 112, sampling="keyframe", **clip)


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("clip.mp4", {"options": EVERY_TEN}),
    ("clip.mov", {"options": EVERY_TEN | {"bf": "3", "preset": "medium"}}),
    ("clip.mkv", {"options": EVERY_TEN}),
    ("clip.ts", {"options": EVERY_TEN}),
    ("clip.avi", {"codec": "mpeg4", "options": EVERY_TEN}),
    ("clip.webm", {"codec": "libvpx-vp9", "options": EVERY_TEN}),
    ("clip.mp4", {"codec": "libsvtav1", "options": {"g": "10"}}),
    (
        "open.mkv",
        {
            "codec": "libx265",
            "options": {
                "x265-params": "log-level=none:pools=none:keyint=10:min-keyint=10:"
                "scenecut=0:open-gop=1:bframes=3"
            },
        },
    ),
]


@pytest.mark.parametrize(("name", "clip"), KINDS)
async def test_keyframes_are_read_exactly(
    readers: FrameReaders, tmp_path: Path, name: str, clip: dict[str, Any]
) -> None:
    path = make_clip(tmp_path / name, num_frames=60, **clip)
    frames = await readers.read(path, by_keyframe(4))
    assert frames.indices == (0, 10, 30, 50)
    assert frames.timestamps_s == pytest.approx([0.0, 0.4, 1.2, 2.0])
    assert frame_numbers(frames.pixels) == list(frames.indices)
    assert frames.warnings == ()
    every = await readers.read(path, FrameSpec(60, 112))
    assert (frames.pixels == every.pixels[list(frames.indices)]).all()


async def test_no_other_frame_is_decoded(readers: FrameReaders, tmp_path: Path) -> None:
    """All others may be broken."""
    path = make_clip(tmp_path / "clip.mp4", num_frames=60, options=EVERY_TEN)
    frames = await readers.read(path, by_keyframe(6))
    content = bytearray(path.read_bytes())
    for at, size in frames_between_keyframes(path):
        content[at + 5 : at + size] = bytes(size - 5)
    path.write_bytes(content)
    again = await readers.read(path, by_keyframe(6))
    assert (again.pixels == frames.pixels).all()
    assert again.warnings == ()


async def test_fewer_keyframes_than_wanted_are_repeated_with_a_warning(
    readers: FrameReaders, tmp_path: Path
) -> None:
    path = make_clip(tmp_path / "clip.mp4", num_frames=25, options=EVERY_TEN)
    frames = await readers.read(path, by_keyframe(5))
    assert frames.indices == (0, 0, 10, 10, 20)
    assert frame_numbers(frames.pixels) == list(frames.indices)
    assert frames.warnings == ("the clip has 3 keyframes, which are repeated",)


async def test_a_part_of_the_video_has_its_own_keyframes(
    readers: FrameReaders, tmp_path: Path
) -> None:
    path = make_clip(tmp_path / "clip.mp4", num_frames=60, options=EVERY_TEN)
    frames = await readers.read(path, by_keyframe(2, start_s=0.5, end_s=1.3))
    assert frames.indices == (20, 30)


async def test_a_clip_between_two_keyframes_is_sampled_evenly_with_a_warning(
    readers: FrameReaders, tmp_path: Path
) -> None:
    path = make_clip(tmp_path / "clip.mp4", num_frames=60, options=EVERY_TEN)
    frames = await readers.read(path, by_keyframe(3, start_s=0.45, end_s=0.75))
    assert frames.indices == (11, 14, 18)
    assert frame_numbers(frames.pixels) == list(frames.indices)
    assert frames.warnings == ("no keyframes are known of the clip; all its frames were sampled",)


async def test_so_is_a_video_that_does_not_time_its_frames(
    readers: FrameReaders, tmp_path: Path
) -> None:
    path = make_clip(tmp_path / "clip.avi", codec="mpeg4", options={"bf": "2"})
    frames = await readers.read(path, by_keyframe(3))
    assert frames.indices == (0, 29, 59)
    assert len(frames.warnings) == 1


async def test_a_keyframe_that_does_not_decode_has_a_stand_in(
    readers: FrameReaders, tmp_path: Path
) -> None:
    path = make_clip(tmp_path / "clip.mp4", num_frames=60, options=EVERY_TEN)
    with_holes = bytearray(path.read_bytes())
    at, size = packets_of(path)[10]
    with_holes[at : at + size] = bytes(size)
    path.write_bytes(with_holes)
    frames = await readers.read(path, by_keyframe(6))
    assert frames.pixels.shape == (6, 112, 112, 3)
    assert frames.warnings != ()
    assert frame_numbers(frames.pixels[[0, 2, 5]]) == [0, 20, 50]


def packets_of(path: Path) -> list[tuple[int, int]]:
    """Where each packet of a clip lies: its position and its number of bytes."""
    import av

    with av.open(str(path)) as video:
        packets = [packet for packet in video.demux(video.streams.video[0]) if packet.size]
        return [(packet.pos or 0, packet.size) for packet in packets]


def frames_between_keyframes(path: Path) -> list[tuple[int, int]]:
    return [place for number, place in enumerate(packets_of(path)) if number % 10]
