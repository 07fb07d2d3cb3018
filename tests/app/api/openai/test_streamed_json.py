"""Bodies with a video in them, whatever pieces they come in."""

import base64
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.errors import InvalidFieldsError
from app.api.openai.streamed_json import MEDIUM, Base64Sink, StreamedJson
from app.errors import UploadTooLargeError
from dycoke_core.errors import DycokeError

VIDEO = bytes(range(256)) * 3
ENCODED = base64.b64encode(VIDEO).decode()
URL = f"data:video/mp4;base64,{ENCODED}"


class Reader:
    """Scans a body, and keeps what came out of it."""

    def __init__(self, *, max_text_bytes: int = 4096, max_bytes: int = 1024) -> None:
        self.kinds: list[str] = []
        self.video = bytearray()
        self._max_bytes = max_bytes
        self.scanner = StreamedJson(self._open_sink, max_text_bytes=max_text_bytes)

    async def _open_sink(self, kind: str, key: bytes) -> Base64Sink:
        self.kinds.append(kind)
        return Base64Sink(self._write, max_bytes=self._max_bytes)

    async def _write(self, data: bytes) -> None:
        self.video += data

    async def read(self, body: bytes, size: int) -> Any:
        for start in range(0, len(body), size):
            await self.scanner.feed(body[start : start + size])
        return json.loads(self.scanner.text)


def body_of(url: str, **others: Any) -> bytes:
    part = {"type": "video_url", "video_url": {"url": url}}
    turns = [{"role": "user", "content": [{"type": "text", "text": 'a "b" \\ data:x,'}, part]}]
    return json.dumps({"model": "m", "messages": turns, **others}).encode()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 10**6])
async def test_a_video_is_taken_out_and_the_rest_is_as_it_was(size: int) -> None:
    reader = Reader()
    data = await reader.read(body_of(URL, stop=["data:x", "url"]), size)
    assert bytes(reader.video) == VIDEO and reader.kinds == ["video/mp4"]
    assert data == json.loads(body_of(MEDIUM.format(0), stop=["data:x", "url"]))


@settings(deadline=None)
@given(
    data=st.recursive(
        st.none() | st.booleans() | st.text() | st.sampled_from(["dat", "data", "da\\"]),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("url"), inner),
        max_leaves=10,
    ),
    size=st.integers(1, 40),
    is_ascii=st.booleans(),
)
async def test_a_body_without_a_medium_is_not_changed(data: Any, size: int, is_ascii: bool) -> None:
    body = json.dumps(data, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
    reader = Reader(max_text_bytes=10**6)
    for start in range(0, len(body), size):
        await reader.scanner.feed(body[start : start + size])
    if b"data:" not in body:
        assert reader.scanner.text == body


@pytest.mark.parametrize("key", ["url", "video_url", "video", "file_data"])
async def test_every_key_that_may_name_a_video_is_known(key: str) -> None:
    reader = Reader()
    assert await reader.read(json.dumps({key: URL}).encode(), 50) == {key: MEDIUM.format(0)}
    assert bytes(reader.video) == VIDEO


async def test_other_keys_keep_their_text() -> None:
    reader = Reader()
    data = {"text": "data:video/mp4;base64,AAAA", "videos": "data:,", "u": {"url": "vid_x"}}
    assert await reader.read(json.dumps(data).encode(), 5) == data
    assert not reader.kinds


async def test_slashes_may_be_escaped() -> None:
    reader = Reader()
    body = body_of("@").replace(b"@", URL.replace("/", "\\/").encode())
    await reader.read(body, 11)
    assert bytes(reader.video) == VIDEO and reader.kinds == ["video/mp4"]


@pytest.mark.parametrize(
    "url",
    [
        "data:video/mp4,AAAA",
        "data:;base64",
        "data:",
        "data:#0",
        "data:" + "x" * 500 + ";base64,AAAA",
        "data:video/mp4;base64,AAA",
        "data:video/mp4;base64,AA=A",
        "data:video/mp4;base64,AA==AAAA",
        "data:video/mp4;base64,A A A",
        "data:video/mp4;base64,AAAA,AAAA",
        "data:video/mp4;base64,AAAA-_==",
        "data:video/mp4;base64,AA\\u0041A",
    ],
)
@pytest.mark.parametrize("size", [1, 10**6])
async def test_what_is_no_base64_of_a_video_is_refused(url: str, size: int) -> None:
    body = body_of("@").replace(b"@", url.encode())
    with pytest.raises(InvalidFieldsError):
        await Reader().read(body, size)


async def test_every_medium_of_a_list_has_its_number() -> None:
    reader = Reader(max_bytes=10**4)
    body = json.dumps({"video": [URL, "https://x/y", URL.replace("mp4", "webm")], "url": "u"})
    data = await reader.read(body.encode(), 64)
    assert data == {"video": ["data:#0", "https://x/y", "data:#1"], "url": "u"}
    assert bytes(reader.video) == 2 * VIDEO and reader.kinds == ["video/mp4", "video/webm"]


async def test_too_much_is_refused_before_it_is_decoded() -> None:
    reader = Reader(max_bytes=100)
    with pytest.raises(UploadTooLargeError, match="100 bytes"):
        await reader.read(body_of(URL), 10**6)
    assert not reader.video
    with pytest.raises(UploadTooLargeError, match="text"):
        await Reader(max_text_bytes=50).read(body_of(URL), 16)


async def test_a_body_that_is_cut_short_is_no_json() -> None:
    reader = Reader()
    with pytest.raises((ValueError, DycokeError)):
        await reader.read(body_of(URL)[:-200], 64)


async def test_a_large_video_takes_no_memory() -> None:
    chunk = base64.b64encode(bytes(48 * 1024))
    num_bytes = 0

    async def count(data: bytes) -> None:
        nonlocal num_bytes
        num_bytes += len(data)

    async def open_sink(kind: str, key: bytes) -> Base64Sink:
        return Base64Sink(count, max_bytes=2**30)

    scanner = StreamedJson(open_sink, max_text_bytes=4096)
    await scanner.feed(b'{"url": "data:video/mp4;base64,')
    tracemalloc.start()
    try:
        for _ in range(500):
            await scanner.feed(chunk)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_bytes == 500 * 48 * 1024 and peak_bytes < 4 * len(chunk)
