"""Bodies as they come in: their size, their form, and the fields that they become."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message

from app.api.connection.disconnect import ClientLeftError
from app.api.errors import InvalidFieldsError
from app.api.post.intake import (
    JSON,
    MULTIPART,
    check_container,
    check_content_type,
    check_idempotency_key,
    content_type,
    may_hold_video,
    parse_object,
    read_body,
    read_form_fields,
    read_json_fields,
    read_small_body,
)
from app.api.post.multipart import MAX_TEXT_BYTES
from app.errors import ForbiddenError, UnsupportedMediaTypeError, UploadTooLargeError
from app.video_store import Upload
from dycoke_core.errors import InvalidRequestError, UnsupportedContainerError
from tests.app.video_store.videos import open_store
from tests.integration.api import CLIP

BOUNDARY = "x"


def request(*pieces: bytes, is_cut: bool = False, **headers: str) -> Request:
    """Args: is_cut: the client leaves after these pieces."""
    messages: list[Message] = [
        {"type": "http.request", "body": piece, "more_body": True} for piece in pieces
    ]
    end: Message = {"type": "http.request", "body": b"", "more_body": False}
    messages.append({"type": "http.disconnect"} if is_cut else end)

    async def receive() -> Message:
        return messages.pop(0)

    raw = [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive)


def form(*fields: tuple[str, str], video: bytes | None = None) -> Request:
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode()
        for name, text in fields
    ]
    if video is not None:
        head = 'Content-Disposition: form-data; name="video"; filename="clip"'
        parts.append(f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode())
        parts += [video[at : at + 1000] for at in range(0, len(video), 1000)]
        parts.append(b"\r\n")
    return request(
        *parts, f"--{BOUNDARY}--\r\n".encode(), content_type=f"{MULTIPART}; boundary={BOUNDARY}"
    )


@pytest.fixture
async def upload(tmp_path: Path) -> AsyncIterator[Upload]:
    async with (await open_store(tmp_path)).receive() as upload:
        yield upload


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "schlüssel", "a\n"])
def test_an_idempotency_key_is_short_printable_ascii(key: str) -> None:
    with pytest.raises(InvalidRequestError, match="Idempotency-Key"):
        check_idempotency_key(key)


def test_any_other_idempotency_key_is_taken() -> None:
    for key in (None, "!", "x" * 255):
        check_idempotency_key(key)


def test_the_type_of_a_body_is_told_without_its_parameters() -> None:
    assert content_type(request(content_type="Application/JSON ; charset=utf-8")) == JSON
    assert content_type(request()) == ""
    assert check_content_type(request(content_type=JSON), JSON, MULTIPART) == JSON
    with pytest.raises(UnsupportedMediaTypeError, match=f"{JSON} or {MULTIPART}"):
        check_content_type(request(content_type="text/plain"), JSON, MULTIPART)


@pytest.mark.parametrize(
    ("headers", "may"),
    [
        ({"content_type": f"{MULTIPART}; boundary=x", "content_length": "1"}, True),
        ({"content_type": JSON, "content_length": str(MAX_TEXT_BYTES)}, False),
        ({"content_type": JSON, "content_length": str(MAX_TEXT_BYTES + 1)}, True),
        ({"content_type": JSON}, True),
        ({"content_type": JSON, "content_length": "-1"}, True),
    ],
)
def test_a_body_that_may_hold_a_video_is_known_by_its_headers(
    headers: dict[str, str], may: bool
) -> None:
    assert may_hold_video(request(**headers)) is may


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b'{"fps": NaN}', b"\xff", b"null"])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="JSON"):
        parse_object(body)


async def test_a_body_is_read_to_its_limit() -> None:
    assert await read_small_body(request(b"ab", b"", b"cd")) == b"abcd"
    taken = []
    with pytest.raises(UploadTooLargeError, match="4 bytes"):
        async with aclosing(read_body(request(b"abc", b"de"), max_bytes=4)) as chunks:
            async for chunk in chunks:
                taken.append(chunk)
    assert taken == [b"abc"]


async def test_a_body_that_is_announced_too_large_is_not_read() -> None:
    announced = request(content_length="5")
    with pytest.raises(UploadTooLargeError):
        async with aclosing(read_body(announced, max_bytes=4)) as chunks:
            await anext(chunks)


async def test_a_client_that_leaves_is_no_shorter_body() -> None:
    with pytest.raises(ClientLeftError):
        await read_small_body(request(b'{"question": ', is_cut=True))


async def test_json_says_its_types_itself() -> None:
    fields = await read_json_fields(request(b'{"question": "What?", "video_id": "vid_1"}'))
    assert (fields.question, fields.video_id) == ("What?", "vid_1")
    with pytest.raises(InvalidFieldsError) as caught:
        await read_json_fields(request(b'{"question": "?", "video_id": "v", "num_frames": "8"}'))
    assert [problem.field for problem in caught.value.problems] == ["num_frames"]


async def test_json_without_a_video_is_told_how_to_send_one() -> None:
    with pytest.raises(InvalidFieldsError) as caught:
        await read_json_fields(request(b'{"question": "What?"}'))
    (problem,) = caught.value.problems
    assert problem.field == "video_id" and MULTIPART in problem.message


async def test_a_forms_text_becomes_numbers_lists_and_objects(upload: Upload) -> None:
    fields, has_video = await read_form_fields(
        form(
            ("question", "What?"),
            ("num_frames", "8"),
            ("stream", "false"),
            ("compression", ' {"policy": "dycoke", "k": 0.5}'),
            ("stop", "a"),
            ("stop", "b"),
            video=CLIP,
        ),
        upload,
        on_file=lambda: None,
    )
    assert has_video and upload.head.startswith(CLIP[:16])
    assert (fields.num_frames, fields.stream, fields.stop) == (8, False, ["a", "b"])
    assert fields.compression == {"policy": "dycoke", "k": 0.5}


@pytest.mark.parametrize(
    ("text", "stop"), [('["a", "b"]', ["a", "b"]), ("[a", ["[a"]), ("7", ["7"]), ("[]", [])]
)
async def test_a_single_stop_field_may_be_a_list(
    upload: Upload, text: str, stop: list[str]
) -> None:
    fields, _ = await read_form_fields(
        form(("question", "?"), ("video_id", "vid_1"), ("stop", text)),
        upload,
        on_file=lambda: None,
    )
    assert fields.stop == stop


@pytest.mark.parametrize(
    ("fields", "video", "name"),
    [
        ([("question", "?")], None, "video"),
        ([("question", "?"), ("video_id", "vid_1")], CLIP, "video"),
        ([("question", "?"), ("question", "?"), ("video_id", "v")], None, "question"),
        ([("messages", "[{"), ("video_id", "v")], None, "messages"),
        ([("question", "?"), ("compression", "{k}"), ("video_id", "v")], None, "compression"),
        ([("question", "?"), ("num_frames", "many"), ("video_id", "v")], None, "num_frames"),
    ],
)
async def test_a_field_that_is_wrong_is_named(
    upload: Upload, fields: list[tuple[str, str]], video: bytes | None, name: str
) -> None:
    with pytest.raises(InvalidFieldsError) as caught:
        await read_form_fields(form(*fields, video=video), upload, on_file=lambda: None)
    assert [problem.field for problem in caught.value.problems] == [name]


@pytest.mark.parametrize("video", [CLIP, b""])
async def test_a_key_that_may_not_upload_is_refused_at_the_videos_first_byte(
    upload: Upload, video: bytes
) -> None:
    def refuse() -> None:
        raise ForbiddenError("this API key lacks the scope 'upload'")

    with pytest.raises(ForbiddenError):
        await read_form_fields(form(("question", "?"), video=video), upload, on_file=refuse)
    assert upload.num_bytes == 0


@pytest.mark.parametrize("head", [b"", b"GIF89a" + bytes(100), b"<html>", bytes(4096)])
def test_what_is_in_no_container_of_ours_is_refused(head: bytes) -> None:
    with pytest.raises(UnsupportedContainerError):
        check_container(head)


async def test_a_form_with_something_else_than_a_video_is_refused(upload: Upload) -> None:
    refused: Any = form(("question", "?"), video=b"no video" * 1000)
    with pytest.raises(UnsupportedContainerError):
        await read_form_fields(refused, upload, on_file=lambda: None)
    assert upload.num_bytes < 8000, "it is refused before its end"
