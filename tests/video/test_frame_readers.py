"""Videos of all kinds, end to end: sniff, plan, decord, PyAV."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import pytest_asyncio

from dycoke_core.errors import (
    InvalidRequestError,
    NoVideoStreamError,
    UnreadableVideoError,
    UnsupportedCodecError,
    UnsupportedContainerError,
    VideoError,
    VideoLimitError,
    VideoReaderKilledError,
    VideoReadTimeoutError,
)
from dycoke_core.video import Container, FrameReaders, FrameSpec, ReadLimits
from tests.video.conftest import descendants, leaving_nothing_behind
from tests.video_clips import frame_numbers, make_audio, make_clip, make_flat_clip

pytestmark = pytest.mark.asyncio(loop_scope="module")

SPEC = FrameSpec(num_frames=8, image_size=112)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[FrameReaders]:
    readers = FrameReaders(ReadLimits(), max_readers=2)
    yield readers
    await readers.aclose()


@pytest.fixture
def without_decord(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dycoke_core.video.frame_readers.FOR_DECORD", frozenset())


@pytest.fixture
def with_decord_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dycoke_core.video.frame_readers.FOR_DECORD", frozenset(Container))


_KINDS = [
    ("clip.mp4", "libx264", {}, "h264"),
    ("clip.mov", "libx264", {}, "h264"),
    ("clip.mkv", "libx264", {}, "h264"),
    ("clip.avi", "libx264", {}, "h264"),
    ("clip.ts", "libx264", {"g": "10"}, "h264"),
    ("clip.mp4", "libx265", {}, "hevc"),
    ("clip.mkv", "libx265", {}, "hevc"),
    ("clip.ts", "libx265", {}, "hevc"),
    ("clip.webm", "libvpx", {}, "vp8"),
    ("clip.webm", "libvpx-vp9", {}, "vp9"),
    ("clip.mp4", "libvpx-vp9", {}, "vp9"),
    ("clip.mp4", "libsvtav1", {}, "av1"),
    ("clip.mkv", "libsvtav1", {}, "av1"),
    ("clip.mp4", "mpeg4", {}, "mpeg4"),
    ("clip.avi", "mpeg4", {}, "mpeg4"),
    ("clip.avi", "mpeg4", {"bf": "2"}, "mpeg4"),
    ("clip.ts", "mpeg2video", {"bf": "2"}, "mpeg2video"),
    ("clip.avi", "mjpeg", {}, "mjpeg"),
]


@pytest.mark.parametrize(("name", "encoder", "options", "codec"), _KINDS)
async def test_every_container_and_codec_gives_exactly_the_frames_asked_for(
    shared: FrameReaders,
    tmp_path: Path,
    name: str,
    encoder: str,
    options: dict[str, str],
    codec: str,
) -> None:
    path = make_clip(tmp_path / name, codec=encoder, options=options)
    probe = await shared.probe(path)
    assert (probe.codec, probe.width, probe.height) == (codec, 192, 128)
    assert probe.fps == pytest.approx(25)
    frames = await shared.read(path, SPEC)
    assert frames.pixels.shape == (8, 112, 112, 3)
    assert frames.indices == (0, 8, 16, 25, 33, 42, 50, 59)
    assert frames.timestamps_s == pytest.approx([index / 25 for index in frames.indices])
    assert frame_numbers(frames.pixels) == list(frames.indices)


@pytest.mark.parametrize("options", [{"g": "10"}, {"g": "1000"}, {"g": "1"}])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts"])
async def test_pyav_seeks_to_the_right_frames(
    shared: FrameReaders,
    tmp_path: Path,
    without_decord: None,
    name: str,
    options: dict[str, str],
) -> None:
    path = make_clip(tmp_path / name, num_frames=100, options=options)
    frames = await shared.read(path, FrameSpec(5, 112, start_s=1.0))
    assert frames.indices == (25, 43, 62, 80, 99)
    assert frame_numbers(frames.pixels) == list(frames.indices)


async def test_fragmented_mp4_is_read(shared: FrameReaders, tmp_path: Path) -> None:
    path = make_clip(
        tmp_path / "clip.mp4",
        options={"g": "10"},
        container_options={"movflags": "frag_keyframe+empty_moov"},
    )
    frames = await shared.read(path, SPEC)
    assert frame_numbers(frames.pixels) == list(frames.indices) == [0, 8, 16, 25, 33, 42, 50, 59]


async def test_sound_beside_the_picture_does_no_harm(shared: FrameReaders, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", sound="aac")
    assert frame_numbers((await shared.read(path, SPEC)).pixels)[-1] == 59


async def test_a_variable_frame_rate_is_sampled_by_frame_number(
    shared: FrameReaders, tmp_path: Path
) -> None:
    pts = [0, 40, 80, 1000, 2000, 2040, 2080, 5000]
    path = make_clip(tmp_path / "clip.mkv", num_frames=8, pts=pts)
    frames = await shared.read(path, FrameSpec(4, 112))
    assert frames.indices == (0, 2, 4, 7)
    assert frames.timestamps_s == pytest.approx([0.0, 0.08, 2.0, 5.0], abs=0.002)
    assert frame_numbers(frames.pixels) == [0, 2, 4, 7]


async def test_one_frame_is_repeated(shared: FrameReaders, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", num_frames=1)
    frames = await shared.read(path, SPEC)
    assert frames.indices == (0,) * 8
    assert (frames.pixels == frames.pixels[0]).all()


async def test_a_single_frame_can_be_asked_for(shared: FrameReaders, tmp_path: Path) -> None:
    frames = await shared.read(make_clip(tmp_path / "clip.mp4"), FrameSpec(1, 112))
    assert frames.indices == (0,)
    assert frames.pixels.shape == (1, 112, 112, 3)


async def test_more_frames_than_the_video_has_are_repeats(
    shared: FrameReaders, tmp_path: Path
) -> None:
    path = make_clip(tmp_path / "clip.webm", codec="libvpx", num_frames=3)
    frames = await shared.read(path, FrameSpec(7, 112))
    assert frames.indices == (0, 0, 0, 1, 1, 1, 2)
    assert frame_numbers(frames.pixels) == list(frames.indices)


@pytest.mark.parametrize(
    ("start_s", "end_s", "indices"),
    [
        (None, 1.0, (0, 8, 16, 24)),
        (1.0, None, (25, 36, 47, 59)),
        (0.5, 0.7, (12, 13, 15, 17)),
        (1.0, 1.001, (25, 25, 25, 25)),
        (2.0, 99.0, (50, 53, 56, 59)),
    ],
)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.ts"])
async def test_a_clip_of_the_video_is_sampled(
    shared: FrameReaders,
    tmp_path: Path,
    name: str,
    start_s: float | None,
    end_s: float | None,
    indices: tuple[int, ...],
) -> None:
    path = make_clip(tmp_path / name)
    frames = await shared.read(path, FrameSpec(4, 112, start_s, end_s))
    assert frames.indices == indices
    assert frame_numbers(frames.pixels) == list(indices)


async def test_a_clip_beyond_the_end_is_refused(shared: FrameReaders, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4")
    with pytest.raises(InvalidRequestError, match=r"start_s .* 2\.40 s"):
        await shared.read(path, FrameSpec(4, 112, start_s=2.5))


@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize("reader", ["decord", "pyav"])
async def test_rotated_videos_come_upright_from_both_readers(
    shared: FrameReaders,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    rotation: int,
    reader: str,
) -> None:
    if reader == "pyav":
        request.getfixturevalue("without_decord")
    as_stored = await shared.read(make_clip(tmp_path / "a.mp4"), SPEC)
    rotated = await shared.read(make_clip(tmp_path / "b.mp4", rotation=rotation), SPEC)
    assert rotated.reader == reader
    upright = np.rot90(as_stored.pixels, rotation // 90, axes=(1, 2)).astype(int)
    assert abs(upright - rotated.pixels.astype(int)).mean() < 3


async def test_frames_that_an_edit_list_hides_are_not_counted(
    shared: FrameReaders, tmp_path: Path
) -> None:
    """As of a recording that was trimmed on a phone, between two keyframes."""
    whole = make_clip(tmp_path / "whole.mp4", options={"g": "25"})
    trimmed = _trim(whole, tmp_path / "trimmed.mp4", num_frames=15)
    frames = await shared.read(trimmed, FrameSpec(4, 112))
    assert frames.indices == (0, 14, 29, 44)
    assert frame_numbers(frames.pixels) == [15, 29, 44, 59]


async def test_progress_rises_to_one(shared: FrameReaders, tmp_path: Path) -> None:
    shares: list[float] = []
    await shared.read(make_clip(tmp_path / "clip.mp4"), SPEC, on_progress=shares.append)
    assert shares == sorted(set(shares))
    assert shares[-1] == 1.0


# --- files that are no videos, or too large ---

_NOISE = np.random.default_rng(0).bytes(50_000)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", UnreadableVideoError),
        (b"\x00", UnsupportedContainerError),
        (_NOISE, UnsupportedContainerError),
        (b"\x00\x00\x00\x20ftypisom" + _NOISE, UnreadableVideoError),
        (b"\x1a\x45\xdf\xa3" + _NOISE, UnreadableVideoError),
        (b"RIFF\xff\x00\x00\x00AVI " + _NOISE, NoVideoStreamError),
        ((b"G" + bytes(187)) * 200, VideoError),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", UnsupportedContainerError),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", UnsupportedContainerError),
        (b"v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n", UnsupportedContainerError),
        (b"GIF89a" + bytes(1000), UnsupportedContainerError),
    ],
)
async def test_what_is_no_video_is_refused(
    shared: FrameReaders, tmp_path: Path, content: bytes, error: type[VideoError]
) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(content)
    with pytest.raises(error):
        await shared.probe(path)
    with pytest.raises(error) as caught:
        await shared.read(path, SPEC)
    assert str(tmp_path) not in caught.value.message


async def test_sound_alone_is_no_video(shared: FrameReaders, tmp_path: Path) -> None:
    with pytest.raises(NoVideoStreamError):
        await shared.probe(make_audio(tmp_path / "sound.mp4"))


@pytest.mark.parametrize(("name", "codec"), [("clip.mkv", "ffv1"), ("clip.avi", "huffyuv")])
async def test_a_codec_we_do_not_take_is_refused_by_name(
    shared: FrameReaders, tmp_path: Path, name: str, codec: str
) -> None:
    path = make_clip(tmp_path / name, codec=codec, pix_fmt="yuv422p", num_frames=2)
    with pytest.raises(UnsupportedCodecError, match=codec):
        await shared.probe(path)
    with pytest.raises(UnsupportedCodecError, match=codec):
        await shared.read(path, SPEC)


async def test_a_codec_that_nobody_knows_is_refused(shared: FrameReaders, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mkv", num_frames=2)
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_NOBODYS/CODEC"))
    num_exceptions = shared.num_exceptions
    with pytest.raises(UnsupportedCodecError):
        await shared.probe(path)
    with pytest.raises(UnsupportedCodecError):
        await shared.read(path, SPEC)
    assert shared.num_exceptions == num_exceptions


@pytest.mark.parametrize("path", ["missing", ""])
async def test_what_is_no_file_is_refused(shared: FrameReaders, tmp_path: Path, path: str) -> None:
    with pytest.raises(UnreadableVideoError):
        await shared.probe(tmp_path / path)


async def test_a_huge_picture_is_refused_also_where_the_container_lies_about_it(
    shared: FrameReaders, tmp_path: Path
) -> None:
    path = make_flat_clip(tmp_path / "huge.mp4", width=8192, height=4320)
    with pytest.raises(VideoLimitError, match="8192x4320"):
        await shared.probe(path)
    content = bytearray(path.read_bytes())
    at = content.index(b"avc1", content.index(b"stsd")) + 28  # the sample entry's width and height
    content[at : at + 4] = (320).to_bytes(2, "big") + (240).to_bytes(2, "big")
    path.write_bytes(content)
    with pytest.raises(VideoError):
        await shared.read(path, SPEC)


async def test_a_picture_may_change_its_size_midway_but_not_beyond_the_limit(
    shared: FrameReaders, tmp_path: Path
) -> None:
    start = make_clip(tmp_path / "start.ts", num_frames=30).read_bytes()
    path = tmp_path / "grows.ts"
    path.write_bytes(
        start
        + make_flat_clip(tmp_path / "a.ts", width=640, height=480).read_bytes()
        + make_flat_clip(tmp_path / "b.ts", width=8192, height=4320).read_bytes()
    )
    frames = await shared.read(path, FrameSpec(34, 112))
    assert frame_numbers(frames.pixels)[:30] == list(range(30))
    assert frames.warnings == ("2 of 34 frames do not decode; neighbours stand in",)


@pytest.mark.parametrize(
    "limits",
    [
        ReadLimits(max_pixels=100 * 100),
        ReadLimits(max_source_frames=50),
        ReadLimits(max_duration_s=2.0),
        ReadLimits(max_extradata_bytes=8),
    ],
)
async def test_every_limit_on_the_file_holds(tmp_path: Path, limits: ReadLimits) -> None:
    readers = FrameReaders(limits, max_readers=1)
    try:
        with pytest.raises(VideoLimitError):
            await readers.read(make_clip(tmp_path / "clip.mp4"), SPEC)
    finally:
        await readers.aclose()


async def test_frames_are_counted_where_the_headers_do_not(tmp_path: Path) -> None:
    readers = FrameReaders(ReadLimits(max_source_frames=50), max_readers=1)
    try:
        with pytest.raises(VideoLimitError, match="more than 50 frames"):
            await readers.read(make_clip(tmp_path / "clip.mkv"), SPEC)
    finally:
        await readers.aclose()


# --- damage ---


async def test_what_is_left_of_a_truncated_file_is_read_with_a_warning(
    shared: FrameReaders, tmp_path: Path
) -> None:
    path = make_clip(
        tmp_path / "clip.mp4",
        num_frames=100,
        options={"g": "10"},
        container_options={"movflags": "faststart"},
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    frames = await shared.read(path, SPEC)
    assert frames.reader == "pyav"
    assert len(frames.warnings) >= 2
    assert "the file at 4.00 s" in frames.warnings[0]
    assert 30 < frames.indices[-1] < 80
    assert frame_numbers(frames.pixels)[:-1] == list(frames.indices)[:-1]


async def test_a_file_without_its_index_is_unreadable(shared: FrameReaders, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4")  # the index comes last
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UnreadableVideoError):
        await shared.read(path, SPEC)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.ts", "clip.webm"])
async def test_any_damage_gives_frames_or_a_video_error(
    shared: FrameReaders, tmp_path: Path, name: str
) -> None:
    codec = "libvpx" if name.endswith("webm") else "mpeg4"
    whole = make_clip(tmp_path / name, codec=codec, num_frames=20).read_bytes()
    rng = np.random.default_rng(7)
    for _ in range(6):
        damaged = bytearray(whole)
        for position in rng.integers(16, len(whole), 20):
            damaged[position] = rng.integers(0, 256)
        path = tmp_path / f"damaged-{name}"
        path.write_bytes(damaged)
        try:
            frames = await shared.read(path, SPEC)
        except VideoError:
            continue
        assert frames.pixels.shape == (8, 112, 112, 3)
    assert shared.kills["timeout"] == 0


# --- time, memory, processes ---


async def test_a_transport_stream_that_decord_cannot_read_is_read(
    shared: FrameReaders, tmp_path: Path
) -> None:
    path = _long_gop_stream(tmp_path)
    frames = await shared.read(path, SPEC)
    assert (frames.reader, frames.warnings) == ("pyav", ())
    assert frame_numbers(frames.pixels) == list(frames.indices)


async def test_decord_is_killed_in_time_for_pyav(tmp_path: Path, with_decord_for_all: None) -> None:
    path = _long_gop_stream(tmp_path)
    readers = FrameReaders(ReadLimits(decord_share=0.01), max_readers=1)
    try:
        await readers.read(make_clip(tmp_path / "warm.ts"), SPEC)
        kills = readers.kills["timeout"]
        with leaving_nothing_behind():
            frames = await readers.read(path, SPEC)
            assert frames.reader == "pyav"
            assert frames.warnings == ("decord could not read this video (timeout); PyAV did",)
            assert frame_numbers(frames.pixels) == list(frames.indices)
            del frames
        assert readers.kills["timeout"] == kills + 1
    finally:
        await readers.aclose()


async def test_time_over_for_both_readers_is_said_so(shared: FrameReaders, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4")
    with leaving_nothing_behind(), pytest.raises(VideoReadTimeoutError, match=r"within 0\.0 s"):
        await shared.read(path, SPEC, timeout_s=0.001)


async def test_a_reader_without_enough_memory_is_said_to_be_lost(tmp_path: Path) -> None:
    """By an allocation that fails, or by the next page of its stack, which is a crash. Where that
    was decord's, PyAV tries too.
    """
    readers = FrameReaders(ReadLimits(memory_bytes=100 * 2**20), max_readers=1)
    try:
        with pytest.raises(VideoReaderKilledError, match=r"memory|crashed"):
            await readers.read(make_clip(tmp_path / "clip.mp4"), SPEC)
        assert readers.kills["memory"] + readers.kills["crash"] in (1, 2)
    finally:
        await readers.aclose()


async def test_the_largest_picture_costs_the_parent_no_memory(
    shared: FrameReaders, tmp_path: Path
) -> None:
    path = make_flat_clip(tmp_path / "clip.mp4", width=4096, height=2304, num_frames=12)
    await shared.read(make_clip(tmp_path / "small.mp4"), SPEC)
    before = psutil.Process().memory_info().rss
    frames = await shared.read(path, SPEC)
    assert psutil.Process().memory_info().rss - before < 30 * 2**20
    assert frames.pixels.nbytes == 8 * 112 * 112 * 3


async def test_readings_leave_nothing_behind(shared: FrameReaders, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"\x00\x00\x00\x20ftypisom" + bytes(1000))
    await shared.read(path, SPEC)
    with leaving_nothing_behind():
        for _ in range(3):
            await asyncio.gather(
                shared.read(path, SPEC),
                shared.read(path, SPEC),
                shared.probe(path),
                shared.read(broken, SPEC),
                return_exceptions=True,
            )
        await asyncio.sleep(0)  # until then the loop holds what it woke this task with


async def test_a_cancelled_reading_is_killed_and_frees_its_place(
    shared: FrameReaders, tmp_path: Path
) -> None:
    path = make_clip(tmp_path / "clip.mp4", width=640, height=360, num_frames=100)
    await shared.read(path, SPEC)
    servers = [process for process in descendants() if not process.children()]
    with leaving_nothing_behind():
        for delay_s in (0.0, 0.005, 0.02, 0.05, 0.1):
            readings = [asyncio.create_task(shared.read(path, SPEC)) for _ in range(4)]
            await asyncio.sleep(delay_s)
            for reading in readings:
                reading.cancel()
            outcomes = await asyncio.gather(*readings, return_exceptions=True)
            assert all(not isinstance(outcome, VideoError) for outcome in outcomes)
            del outcomes, readings, reading
        for _ in range(500):
            await asyncio.sleep(0.01)
            if not any(server.children() for server in servers):
                break
    assert frame_numbers((await shared.read(path, SPEC)).pixels)[-1] == 99


def _long_gop_stream(folder: Path) -> Path:
    """One keyframe and B-frames in a transport stream: decord seeks in it without end."""
    return make_clip(
        folder / "long.ts",
        width=640,
        height=360,
        num_frames=250,
        fps=30,
        options={"preset": "medium", "g": "1000", "keyint_min": "1000", "sc_threshold": "0"},
    )


def _trim(source: Path, target: Path, num_frames: int) -> Path:
    """Copies a clip with an edit list that hides its first frames."""
    import av

    with av.open(str(source)) as original, av.open(str(target), "w") as trimmed:
        stream = original.streams.video[0]
        copy = trimmed.add_stream_from_template(stream)
        assert stream.time_base is not None
        hidden = int(num_frames / 25 / stream.time_base)
        for packet in original.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                packet.pts, packet.dts = packet.pts - hidden, packet.dts - hidden
                packet.stream = copy
                trimmed.mux(packet)
    return target
