"""Frames do not depend on how many threads decode them, nor on what was not decoded."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import pytest_asyncio
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from dycoke_core.errors import VideoError
from dycoke_core.video import Container, FrameReaders, FrameSpec, ReadLimits, VideoFrames
from dycoke_core.video.pyav_frames import FrameSource, list_frames
from tests.video_clips import make_clip

pytestmark = pytest.mark.asyncio(loop_scope="module")

SPEC = FrameSpec(8, 112)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def by_threads() -> AsyncIterator[dict[int, FrameReaders]]:
    readers = {n: FrameReaders(ReadLimits(), max_readers=1, num_cores=n) for n in (1, 4)}
    yield readers
    for each in readers.values():
        await each.aclose()


async def outcome(readers: FrameReaders, path: Path) -> VideoFrames | str:
    try:
        return await readers.read(path, SPEC)
    except VideoError as error:
        return error.code


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("clip.mp4", {}),
    ("clip.ts", {"options": {"g": "10"}}),
    ("clip.mkv", {"codec": "libx265"}),
    ("clip.mp4", {"codec": "mpeg4", "options": {"bf": "2"}}),
    ("clip.webm", {"codec": "libvpx-vp9"}),
    ("clip.mp4", {"codec": "libsvtav1"}),
]


@pytest.mark.parametrize("num_damaged_bytes", [0, 8])
@pytest.mark.parametrize("reader", ["decord", "pyav"])
@pytest.mark.parametrize(("name", "clip"), KINDS)
async def test_frames_are_the_same_with_any_number_of_threads(
    by_threads: dict[int, FrameReaders],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    clip: dict[str, Any],
    reader: str,
    num_damaged_bytes: int,
) -> None:
    """What a decoder substitutes for lost data differs with the number of its threads."""
    containers = frozenset(Container) if reader == "decord" else frozenset[Container]()
    monkeypatch.setattr("dycoke_core.video.frame_readers.FOR_DECORD", containers)
    content = bytearray(make_clip(tmp_path / name, width=320, height=192, **clip).read_bytes())
    random = np.random.default_rng(3)
    for at in random.integers(len(content) // 4, len(content) * 3 // 4, num_damaged_bytes):
        content[at] = random.integers(0, 256)
    path = tmp_path / f"damaged-{name}"
    path.write_bytes(content)
    one, four = [await outcome(by_threads[n], path) for n in (1, 4)]
    if isinstance(one, str) or isinstance(four, str):
        assert one == four
        return
    assert (one.reader, one.indices, one.warnings) == (four.reader, four.indices, four.warnings)
    assert (one.pixels == four.pixels).all()


async def test_readers_at_work_share_the_cores(
    by_threads: dict[int, FrameReaders], monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = by_threads[4]
    with (
        readers.decoding_threads() as first,
        readers.decoding_threads() as second,
        readers.decoding_threads() as third,
    ):
        assert (first, second, third) == (4, 2, 1)
    with readers.decoding_threads() as alone:
        assert alone == 4


class Video:
    """A clip, and the frames that were decoded of it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.num_decoded = 0
        decode = FrameSource._decode_packet

        def counting(source: FrameSource, packet: Any) -> list[VideoFrame]:
            frames = decode(source, packet)
            self.num_decoded += len(frames)
            return frames

        monkeypatch.setattr(FrameSource, "_decode_packet", counting)

    def open(self) -> tuple[InputContainer, VideoStream]:
        container = av.open(str(self.path))
        return container, container.streams.video[0]

    def read(self, wanted: list[int]) -> list[np.ndarray[Any, Any]]:
        frames = list_frames(*self.open(), max_frames=1000)
        source = FrameSource(self.open, frames, wanted)
        found = [source.frame_at(number) for number in wanted]
        assert [number for number, _ in found] == wanted
        return [frame.to_ndarray() for _, frame in found]


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("clip.mp4", "libx264", {"preset": "medium", "bf": "3"}),
        ("clip.mkv", "libx265", {"preset": "medium"}),
        ("clip.ts", "mpeg2video", {"bf": "2"}),
    ],
)
async def test_frames_that_nobody_needs_are_not_decoded_and_the_others_are_identical(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    codec: str,
    options: dict[str, str],
) -> None:
    clip = make_clip(tmp_path / name, codec=codec, options=options, num_frames=60)
    video = Video(clip, monkeypatch)
    whole = video.read(list(range(60)))
    assert video.num_decoded >= 60
    video.num_decoded = 0
    wanted = [0, 7, 8, 22, 41, 59]
    assert all((a == whole[n]).all() for n, a in zip(wanted, video.read(wanted), strict=True))
    assert 6 <= video.num_decoded < 50


async def test_an_interlaced_video_is_decoded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its frames may be two fields, in a packet each."""
    options = {"preset": "medium", "bf": "3", "x264-params": "tff=1"}
    video = Video(make_clip(tmp_path / "clip.mp4", options=options), monkeypatch)
    video.read([0, 59])
    assert video.num_decoded >= 60
