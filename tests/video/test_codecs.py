"""The list of codecs holds for every stream, and a file is demuxed as what it was taken for."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import av
import pytest
import pytest_asyncio

from dycoke_core.video import FrameReaders, FrameSpec, ReadLimits
from tests.video_clips import clip_frame, frame_numbers, make_clip

pytestmark = pytest.mark.asyncio(loop_scope="module")

SPEC = FrameSpec(4, 112)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def readers() -> AsyncIterator[FrameReaders]:
    readers = FrameReaders(ReadLimits(), max_readers=1)
    yield readers
    await readers.aclose()


def add_track(source: Path, target: Path, codec: str, pix_fmt: str) -> Path:
    """Copies a clip and adds a second picture, smaller, so that the first is the better one."""
    with av.open(str(source)) as original, av.open(str(target), "w") as output:
        first = original.streams.video[0]
        copy = output.add_stream_from_template(first)
        second: Any = output.add_stream(codec, rate=25, options={"strict": "experimental"})
        second.width, second.height, second.pix_fmt = 64, 48, pix_fmt
        for number in range(3):
            frame = av.VideoFrame.from_ndarray(clip_frame(number, 64, 48), "rgb24")
            output.mux(second.encode(frame))
        output.mux(second.encode())
        for packet in original.demux(first):
            if packet.size:
                packet.stream = copy
                output.mux(packet)
    return target


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "name", "reader"),
    [
        ("jpeg2000", "yuv420p", "two.mkv", "pyav"),
        ("prores_ks", "yuv422p10le", "two.mov", "pyav"),
        ("ffv1", "yuv420p", "two.mkv", "pyav"),
        ("png", "rgb24", "two.mov", "pyav"),
        ("mpeg4", "yuv420p", "two.mkv", "decord"),
    ],
)
async def test_decord_sees_no_file_with_a_codec_that_is_not_on_the_list(
    readers: FrameReaders, tmp_path: Path, codec: str, pix_fmt: str, name: str, reader: str
) -> None:
    path = add_track(make_clip(tmp_path / "one.mp4"), tmp_path / name, codec, pix_fmt)
    frames = await readers.read(path, SPEC)
    assert (frames.reader, frames.warnings) == (reader, ())
    assert frame_numbers(frames.pixels) == list(frames.indices) == [0, 19, 39, 59]


@pytest.mark.parametrize(
    ("codec", "reader"), [("aac", "decord"), ("mp3", "decord"), ("ac3", "pyav"), ("flac", "pyav")]
)
async def test_the_same_goes_for_sound(
    readers: FrameReaders, tmp_path: Path, codec: str, reader: str
) -> None:
    path = make_clip(tmp_path / "clip.mkv", sound=codec)
    assert (await readers.read(path, SPEC)).reader == reader


async def test_decord_demuxes_nothing_as_another_container(
    readers: FrameReaders, tmp_path: Path
) -> None:
    """An MP4 file by its first box, in which FFmpeg finds a transport stream."""
    stream = make_clip(tmp_path / "clip.ts", num_frames=200).read_bytes()[: 188 * 1000]
    box = (len(stream) + 8).to_bytes(4, "big") + b"skip" + stream
    path = tmp_path / "both.mp4"
    clip = make_clip(
        tmp_path / "clip.mp4",
        container_options={"movflags": "frag_keyframe+empty_moov+default_base_moof"},
    )
    path.write_bytes(box + clip.read_bytes())
    frames = await readers.read(path, SPEC)
    assert frames.reader == "pyav"
    assert frames.warnings == ("decord could not read this video (unreadable); PyAV did",)
    assert frame_numbers(frames.pixels) == list(frames.indices) == [0, 19, 39, 59]
