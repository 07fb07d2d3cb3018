"""multipart/form-data as a stream: text parts into bounded memory, one file part into a sink.

The file is neither held in memory nor spooled: its bytes are passed on as they arrive. What the
client says about it (file name, content type) is ignored.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from dycoke_core.errors import InvalidRequestError

MAX_PARTS = 48
MAX_TEXT_BYTES = 1 << 20  # all text parts together
SLICE_BYTES = 1 << 16  # parsed between two rounds of the event loop

MALFORMED = "the multipart body is malformed: write it as RFC 7578 says"


@dataclass(slots=True)
class MultipartForm:
    fields: list[tuple[str, str]] = field(default_factory=list)  # in the order of arrival
    has_file: bool = False


async def read_multipart(
    body: AsyncIterator[bytes],
    content_type: str,
    *,
    file_field: str,
    write_file: Callable[[bytes], Awaitable[None]],
) -> MultipartForm:
    """Parses a body while it comes in.

    Raises:
        InvalidRequestError: malformed, cut short, too many parts or too much text.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise InvalidRequestError(
            "the Content-Type names no boundary: write multipart/form-data; boundary=..."
        )
    collector = _Collector(file_field)
    try:
        parser = MultipartParser(boundary, collector.callbacks())  # type: ignore[arg-type]
        async for chunk in body:
            for start in range(0, len(chunk), SLICE_BYTES):
                parser.write(chunk[start : start + SLICE_BYTES])
                for data in collector.take_file_data():
                    await write_file(data)
                await asyncio.sleep(0)
    except FormParserError:
        raise InvalidRequestError(MALFORMED) from None
    if not collector.is_complete:
        raise InvalidRequestError("the multipart body ends before its closing boundary")
    return collector.form


class _Collector:
    """Turns the parser's callbacks into a form."""

    def __init__(self, file_field: str) -> None:
        self.form = MultipartForm()
        self.is_complete = False
        self._file_field = file_field
        self._file_data: list[bytes] = []
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        self._name = ""
        self._text = bytearray()
        self._num_parts = 0
        self._num_text_bytes = 0

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def take_file_data(self) -> list[bytes]:
        data, self._file_data = self._file_data, []
        return data

    def _on_part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise InvalidRequestError(f"the form has more than {MAX_PARTS} parts")
        self._disposition = b""
        self._text = bytearray()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in options:
            raise InvalidRequestError("a part of the form has no name in its Content-Disposition")
        self._name = _decode(options[b"name"])
        if self._name == self._file_field:
            if self.form.has_file:
                raise InvalidRequestError(
                    f"'{self._file_field}' is given twice: a form has one file"
                )
            self.form.has_file = True

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == self._file_field:
            self._file_data.append(data[start:end])
            return
        self._num_text_bytes += end - start
        if self._num_text_bytes > MAX_TEXT_BYTES:
            raise InvalidRequestError(
                f"the form's text is larger than {MAX_TEXT_BYTES} bytes at '{self._name[:64]}'; "
                f"the file goes in '{self._file_field}'"
            )
        self._text += data[start:end]

    def _on_part_end(self) -> None:
        if self._name != self._file_field:
            self.form.fields.append((self._name, self._decode_text()))

    def _decode_text(self) -> str:
        try:
            return self._text.decode()
        except UnicodeDecodeError:
            raise InvalidRequestError(
                f"'{self._name[:64]}' is not UTF-8 text; the file goes in '{self._file_field}'"
            ) from None

    def _on_end(self) -> None:
        self.is_complete = True


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidRequestError("the names of a form's parts must be UTF-8") from None
