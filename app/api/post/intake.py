"""Reads a request's body while it arrives (JSON, or a form with a video), within limits of size,
into fields that have been checked.
"""

import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from app.api.connection.disconnect import ClientLeftError
from app.api.errors import InvalidFieldsError
from app.api.post.multipart import MAX_TEXT_BYTES, MultipartForm, read_multipart
from app.api.schemas import ChatFields
from app.errors import UnsupportedMediaTypeError, UploadTooLargeError
from app.video_store import Upload
from dycoke_core.errors import InvalidRequestError, UnsupportedContainerError
from dycoke_core.video import SNIFF_BYTES, Container, sniff_container

FORM_OVERHEAD_BYTES = MAX_TEXT_BYTES + 65536  # text, and the headers of all parts
MULTIPART = "multipart/form-data"
JSON = "application/json"
VIDEO_FIELD = "video"

_LINE_AND_COLUMN = re.compile(r"line (\d+) column (\d+)$")
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def check_idempotency_key(key: str | None) -> None:
    """Raises: InvalidRequestError."""
    if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequestError("Idempotency-Key must be 1 to 255 printable ASCII characters")


def content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def may_hold_video(request: Request) -> bool:
    """Whether the body is a form, or longer than text alone may be, judged by the headers."""
    if content_type(request) == MULTIPART:
        return True
    announced = request.headers.get("content-length", "")
    return not announced.isdecimal() or int(announced) > MAX_TEXT_BYTES


async def read_json_fields(request: Request) -> ChatFields:
    """Reads a question about a stored video."""
    fields = _validate(parse_object(await read_small_body(request)), is_strict=True)
    if fields.video_id is None:
        raise InvalidFieldsError.of(
            "video_id", "Field required; send a new video as multipart/form-data"
        )
    return fields


def parse_object(body: bytes, *, is_as_sent: bool = True) -> dict[str, Any]:
    """Args: is_as_sent: False: omits positions in it, which would mean nothing to the client.

    Raises: InvalidRequestError: it is no JSON object.
    """
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        place = _place(error) if is_as_sent else ""
        raise InvalidRequestError(f"the body is not valid JSON{place}") from None
    if not isinstance(data, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return data


async def read_small_body(request: Request) -> bytes:
    """Reads a body that contains only text."""
    body = bytearray()
    async with aclosing(read_body(request, max_bytes=MAX_TEXT_BYTES)) as chunks:
        async for chunk in chunks:
            body += chunk
    return bytes(body)


async def read_form_fields(
    request: Request, upload: Upload, *, on_file: Callable[[], None]
) -> tuple[ChatFields, bool]:
    """Reads a question and, usually, its video.

    Args:
        on_file: called when a video begins to arrive; raises to refuse it.

    Returns:
        The fields, and whether a video has come.
    """
    form = await read_form(request, upload, on_file=on_file)
    fields = _validate(_from_form(form.fields), is_strict=False)
    if form.has_file == (fields.video_id is not None):
        raise InvalidFieldsError.of("video", "give exactly one of 'video' and 'video_id'")
    return fields, form.has_file


async def read_form(
    request: Request,
    upload: Upload,
    *,
    file_field: str = VIDEO_FIELD,
    on_file: Callable[[], None] = lambda: None,
) -> MultipartForm:
    """Reads a form whose part `file_field` goes to `upload` as it comes in."""

    async def write_video(data: bytes) -> None:
        on_file()
        await write_recognisable(upload, data)

    max_bytes = upload.max_bytes + FORM_OVERHEAD_BYTES
    async with aclosing(read_body(request, max_bytes=max_bytes)) as chunks:
        form = await read_multipart(
            chunks,
            request.headers["content-type"],
            file_field=file_field,
            write_file=write_video,
        )
    if form.has_file:
        on_file()  # an empty file brings no data
        check_container(upload.head)
    return form


async def write_recognisable(upload: Upload, data: bytes) -> None:
    """Writes a video's next bytes; refuses an unsupported container before the rest arrives."""
    was_recognisable = upload.num_bytes >= SNIFF_BYTES
    await upload.write(data)
    if not was_recognisable and upload.num_bytes >= SNIFF_BYTES:
        check_container(upload.head)


def check_container(head: bytes) -> None:
    if sniff_container(head) in (None, Container.FRAMES):  # never uploaded as such
        raise UnsupportedContainerError


def check_content_type(request: Request, *taken: str) -> str:
    given = content_type(request)
    if given not in taken:
        raise UnsupportedMediaTypeError(f"the Content-Type must be {' or '.join(taken)}")
    return given


async def read_body(request: Request, *, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body's bytes as they arrive; `app.api.connection.bodies` limits how slowly.

    Raises:
        UploadTooLargeError: at once by the announced length, else when the bytes have arrived.
        UploadTimeoutError
        ClientLeftError
    """
    too_large = UploadTooLargeError(f"the body is larger than {max_bytes} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    num_bytes = 0
    try:
        async with aclosing(request.stream()) as chunks:
            async for chunk in chunks:
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise too_large
                yield chunk
    except ClientDisconnect:
        raise ClientLeftError from None


def _from_form(fields: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Converts form fields to the equivalent JSON body."""
    data: dict[str, Any] = {}
    for name, text in fields:
        if name == "stop":
            data.setdefault(name, []).append(text)
        elif name in data:
            raise InvalidFieldsError.of(name, "is given twice: give it once")
        elif name == "messages" or (name == "compression" and text.lstrip().startswith("{")):
            data[name] = _json_field(name, text)
        else:
            data[name] = text
    if len(data.get("stop", ())) == 1:
        data["stop"] = _list_or_text(data["stop"][0])
    return data


def _json_field(name: str, text: str) -> Any:
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidFieldsError.of(name, f"not valid JSON{_place(error)}") from None


def _place(error: ValueError) -> str:
    """Where the JSON parser gave up: two numbers, without the rest of its message."""
    place = _LINE_AND_COLUMN.search(str(error))
    return f": see line {place[1]}, column {place[2]}" if place else ""


def _list_or_text(text: str) -> Any:
    """Parses a stop field: a JSON list, or else one stop string."""
    try:
        value = from_json(text)
    except ValueError:
        return [text]
    return value if isinstance(value, list) else [text]


def _validate(data: dict[str, Any], *, is_strict: bool) -> ChatFields:
    """Converts form fields, which are text; a JSON body has types of its own."""
    try:
        return ChatFields.model_validate(data, strict=is_strict)
    except ValidationError as error:
        raise InvalidFieldsError.from_pydantic(
            error.errors(include_input=False, include_url=False)
        ) from None
