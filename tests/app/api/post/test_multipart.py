"""Forms as they stream in: any chunking, bounded, the file passed on and never kept."""

from collections.abc import AsyncIterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.post.multipart import MAX_PARTS, MAX_TEXT_BYTES, MultipartForm, read_multipart
from dycoke_core.errors import InvalidRequestError

BOUNDARY = "frontier"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"


def part(name: str, value: bytes, extra: str = "") -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'
    return head.encode() + value + b"\r\n"


def body(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


async def parse(
    chunks: Sequence[bytes], content_type: str = CONTENT_TYPE
) -> tuple[MultipartForm, bytes]:
    file = bytearray()

    async def write(data: bytes) -> None:
        file.extend(data)

    async def stream() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    form = await read_multipart(stream(), content_type, file_field="video", write_file=write)
    return form, bytes(file)


@given(
    file=st.binary(max_size=300) | st.just(b"\r\n--frontie\r\n--frontier-"),
    text=st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=50),
    cuts=st.lists(st.integers(0, 600), max_size=20),
)
async def test_form_is_the_same_however_it_is_cut(file: bytes, text: str, cuts: list[int]) -> None:
    if f"\r\n--{BOUNDARY}".encode() in file:
        file = b""
    whole = body(part("question", text.encode()), part("video", file), part("stop", b"x"))
    bounds = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    chunks = [whole[a:b] for a, b in pairwise(bounds)]
    form, received = await parse(chunks)
    assert form.fields == [("question", text), ("stop", "x")]
    assert (form.has_file, received) == (True, file)


async def test_file_under_another_name_is_told_where_it_belongs() -> None:
    with pytest.raises(InvalidRequestError, match=r"'file' is not UTF-8 text.*in 'video'"):
        await parse([body(part("file", b"\xff\xd8\x00", '; filename="clip.mp4"'))])


async def test_video_is_known_by_its_name_not_by_a_file_name() -> None:
    form, received = await parse(
        [body(part("question", b"q", '; filename="q.txt"'), part("video", b"v"))]
    )
    assert form.fields == [("question", "q")]
    assert received == b"v"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no form",
        body(part("question", b"x"))[:-6],
        body(part("video", b"x"), part("video", b"y")),
        body(part("question", b"\xff")),
        body(b"--frontier\r\nContent-Disposition: form-data\r\n\r\nx\r\n"),
        body(b"--frontier\r\nContent-Disposition: attachment; name=x\r\n\r\nx\r\n"),
        body(*(part(f"f{i}", b"") for i in range(MAX_PARTS + 1))),
        body(part("question", bytes(MAX_TEXT_BYTES)), part("more", b"x")),
        body(part("x" * 9000, b"")),
        body(b"--frontier\r\n" + b"a: b\r\n" * 99 + b"\r\nx\r\n"),
    ],
    ids=range(11),
)
async def test_malformed_and_excessive_forms_are_refused(content: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        await parse([content])


@pytest.mark.parametrize("boundary", ["", "; boundary=", "; boundary=" + "x" * 300])
async def test_unusable_boundaries_are_refused(boundary: str) -> None:
    with pytest.raises(InvalidRequestError):
        await parse([body()], f"multipart/form-data{boundary}")
