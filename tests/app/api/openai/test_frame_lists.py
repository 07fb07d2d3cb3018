"""Lists of frames on their way into an upload, whatever pieces they come in."""

import base64
import tracemalloc
from typing import cast

import pytest

from app.api.errors import InvalidFieldsError
from app.api.openai.frame_lists import FrameList, PictureSink, PicturesSink
from app.video_store import Upload
from dycoke_core.video.frame_list import MAGIC, encode_index
from tests.pictures import frame_list, picture

PICTURES = [picture("JPEG"), picture("PNG"), picture("WEBP")]
ENCODED = [base64.b64encode(data) for data in PICTURES]


class FakeUpload:
    max_bytes = 10**6

    def __init__(self) -> None:
        self.num_bytes = 0
        self.data = bytearray()

    async def write(self, data: bytes) -> None:
        self.num_bytes += len(data)
        self.data += data


def new_list(max_frames: int = 3) -> tuple[FakeUpload, FrameList]:
    upload = FakeUpload()
    return upload, FrameList(cast(Upload, upload), max_frames=max_frames)


async def take(sink: PictureSink | PicturesSink, text: bytes, size: int) -> None:
    for start in range(0, len(text), size):
        await sink.take(text[start : start + size])
    await sink.finish()


@pytest.mark.parametrize("size", [1, 3, 10, 10**6])
async def test_pictures_are_the_same_one_by_one_and_all_in_one(size: int) -> None:
    upload, frames = new_list()
    await take(await PicturesSink.open(frames), b",".join(ENCODED), size)
    await frames.finish([0, 1, 2], 2)
    assert upload.data == frame_list(PICTURES)
    upload, frames = new_list()
    for text in ENCODED:
        await take(await PictureSink.open(frames), text, size)
    await frames.finish([0, 1, 2], 2.0)
    assert upload.data == frame_list(PICTURES)


async def test_the_index_has_the_order_in_which_they_are_shown() -> None:
    upload, frames = new_list()
    await take(await PicturesSink.open(frames), b",".join(ENCODED), 100)
    await frames.finish([2, 0, 2], 1.5)
    places = [frames.places[number] for number in (2, 0, 2)]
    assert upload.data == MAGIC + b"".join(PICTURES) + encode_index(places, 1.5)


@pytest.mark.parametrize("size", [1, 7, 10**6])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b",", "frame 0 is no"),
        (ENCODED[0] + b",", "frame 1 is no"),
        (ENCODED[0] + b"," + base64.b64encode(b"GIF89a" + bytes(30)), "frame 1 is no"),
        (base64.b64encode(b"\xff\xd8"), "frame 0 is no"),
        (ENCODED[0][:-1], "base64"),
        (ENCODED[0] + b",*", "base64"),
        (b",".join(ENCODED * 2), "at most 3 frames"),
    ],
)
async def test_what_is_no_list_of_pictures_is_refused(text: bytes, message: str, size: int) -> None:
    _, frames = new_list()
    with pytest.raises(InvalidFieldsError, match=message):
        await take(await PicturesSink.open(frames), text, size)
    assert len(frames.places) <= 3


async def test_a_frame_too_many_is_refused_before_it_has_come() -> None:
    upload, frames = new_list(max_frames=1)
    sink = await PicturesSink.open(frames)
    await sink.take(ENCODED[0])
    num_bytes = upload.num_bytes
    with pytest.raises(InvalidFieldsError):
        await sink.take(b",AAAA")
    assert upload.num_bytes <= num_bytes + 3


async def test_large_pictures_take_no_memory() -> None:
    chunk = base64.b64encode(bytes(48 * 1024))
    _, frames = new_list()

    async def forget(data: bytes) -> None:
        frames.upload.num_bytes += len(data)

    frames.upload.write = forget  # type: ignore[method-assign]
    frames.upload.max_bytes = 2**30
    sink = await PicturesSink.open(frames)
    await sink.take(ENCODED[0][:16])
    tracemalloc.start()
    try:
        for _ in range(500):
            await sink.take(chunk)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert frames.upload.num_bytes > 500 * 48 * 1024 and peak_bytes < 6 * len(chunk)
