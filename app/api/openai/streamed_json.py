"""Reads a JSON body that may contain media as `data:` URLs while it arrives.

A JSON parser holds a string until it is complete, and these may have hundreds of megabytes. So the
bytes are scanned before they are parsed. If a string is the value of a key that may name a medium,
and begins with `data:`, it goes to a sink as it arrives, and the text that is parsed gets `data:#0`
in its place (`data:#1` for the next one, and so on). Nothing else is changed or understood, and the
rest has the limit of text.

Knows neither HTTP nor what a video is. Whether the text is valid JSON is the parser's business.
"""

import binascii
import re
from collections.abc import Awaitable, Callable
from typing import Protocol

from app.api.errors import InvalidFieldsError
from app.api.openai.fields import wrong
from app.errors import UploadTooLargeError

MEDIUM = "data:#{}"  # what replaces it in the text; no value of a client's begins so
KEYS = frozenset({b"url", b"video_url", b"video", b"file_data"})

_SCHEME = b"data:"
_MAX_KEY_BYTES = max(map(len, KEYS))
_MAX_HEADER_BYTES = 128
_OUTSIDE = re.compile(rb'[":]')
_INSIDE = re.compile(rb'["\\]')


class Sink(Protocol):
    """Takes one medium, as text in base64."""

    async def take(self, text: bytes) -> None: ...

    async def finish(self) -> None: ...


# Called with a medium's type (`video/mp4`) and the key that names it; raises to refuse it.
OpenSink = Callable[[str, bytes], Awaitable[Sink]]


def base64_size(num_bytes: int) -> int:
    return (num_bytes + 2) // 3 * 4


class Base64Sink:
    """Decodes base64 that comes in pieces.

    Args:
        write: takes the bytes.
        max_bytes: of them; counted before anything is decoded.
    """

    def __init__(self, write: Callable[[bytes], Awaitable[None]], *, max_bytes: int) -> None:
        self._write = write
        self._max_chars = base64_size(max_bytes)
        self._max_bytes = max_bytes
        self._num_chars = 0
        self._rest = b""
        self._is_padded = False

    async def take(self, text: bytes) -> None:
        """Raises: UploadTooLargeError, InvalidFieldsError."""
        self._num_chars += len(text)
        if self._num_chars > self._max_chars:
            raise UploadTooLargeError.of_video(self._max_bytes)
        if not text:
            return
        text = self._rest + text
        whole = len(text) // 4 * 4
        self._rest = text[whole:]
        if whole:
            await self._write(self._decode(text[:whole]))

    async def finish(self) -> None:
        """Raises: InvalidFieldsError."""
        if self._rest:
            raise _malformed()

    def _decode(self, text: bytes) -> bytes:
        if self._is_padded:
            raise _malformed()
        self._is_padded = text.endswith(b"=")
        try:
            return binascii.a2b_base64(text, strict_mode=True)
        except binascii.Error:
            raise _malformed() from None


class StreamedJson:
    """Scans a body.

    Args:
        open_sink: called when a medium begins.
        max_text_bytes: of all but the media.
    """

    def __init__(self, open_sink: OpenSink, *, max_text_bytes: int) -> None:
        self._open_sink = open_sink
        self._max_text_bytes = max_text_bytes
        self._text = bytearray()
        self._state: Callable[[bytes, int], Awaitable[int]] = self._outside
        self._key = b""
        self._string = bytearray()  # the beginning of the last one
        self._head = bytearray()  # of a value that may be a medium, and of a medium
        self._sink: Sink | None = None
        self.num_media = 0  # that have begun

    @property
    def text(self) -> bytes:
        """The body, with `MEDIUM` and its number in a medium's place."""
        return bytes(self._text)

    async def feed(self, chunk: bytes) -> None:
        """Raises: InvalidFieldsError, UploadTooLargeError, and what the sink raises."""
        place = 0
        while place < len(chunk):
            place = await self._state(chunk, place)

    def _keep(self, data: bytes) -> None:
        self._text += data
        if len(self._text) > self._max_text_bytes:
            raise UploadTooLargeError(
                f"the body's text, without data: URLs, is larger than {self._max_text_bytes} bytes"
            )

    # --- states: each takes bytes from a place on and returns the next place ---

    async def _outside(self, chunk: bytes, place: int) -> int:
        match = _OUTSIDE.search(chunk, place)
        if match is None:
            self._keep(chunk[place:])
            return len(chunk)
        self._keep(chunk[place : match.end()])
        if match[0] == b":":
            self._key = bytes(self._string)
            return match.end()
        self._string.clear()
        self._head.clear()
        # A key in an object of several is taken for a value here; it does not begin with `data:`.
        self._state = self._beginning if self._key in KEYS else self._string_body
        return match.end()

    async def _string_body(self, chunk: bytes, place: int) -> int:
        match = _INSIDE.search(chunk, place)
        end = len(chunk) if match is None else match.end()
        self._keep(chunk[place:end])
        if len(self._string) <= _MAX_KEY_BYTES:
            self._string += chunk[place : end if match is None else match.start()][:64]
        if match is not None:
            self._state = self._outside if match[0] == b'"' else self._escaped
        return end

    async def _escaped(self, chunk: bytes, place: int) -> int:
        self._keep(chunk[place : place + 1])
        self._string += b"\\"  # no key of ours has one
        self._state = self._string_body
        return place + 1

    async def _beginning(self, chunk: bytes, place: int) -> int:
        """The first bytes of a value: of a medium, or of any other string."""
        wanted = _SCHEME[len(self._head) :]
        given = chunk[place : place + len(wanted)]
        if not wanted.startswith(given):
            self._keep(bytes(self._head))
            self._string += self._head
            self._state = self._string_body
            return place
        self._head += given
        if len(given) == len(wanted):
            self._head.clear()
            self._state = self._medium_head
        return place + len(given)

    async def _medium_head(self, chunk: bytes, place: int) -> int:
        """`video/mp4;base64,`."""
        comma = chunk.find(b",", place)
        end = len(chunk) if comma < 0 else comma
        self._head += chunk[place:end]
        if len(self._head) > _MAX_HEADER_BYTES or b'"' in self._head:
            raise _wrong_form()
        if comma < 0:
            return end
        kind, *parameters = bytes(self._head).decode("latin-1").replace("\\/", "/").split(";")
        if not parameters or parameters[-1].strip().lower() != "base64":
            raise _wrong_form()
        self._sink = await self._open_sink(kind.strip().lower(), self._key)
        self._keep(MEDIUM.format(self.num_media).encode())
        self.num_media += 1
        self._state = self._medium
        return comma + 1

    async def _medium(self, chunk: bytes, place: int) -> int:
        assert self._sink is not None
        match = _INSIDE.search(chunk, place)
        end = len(chunk) if match is None else match.start()
        await self._sink.take(chunk[place:end])
        if match is None:
            return end
        if match[0] == b'"':
            await self._sink.finish()
            self._keep(b'"')
            self._state = self._outside
        else:
            self._state = self._escaped_medium
        return match.end()

    async def _escaped_medium(self, chunk: bytes, place: int) -> int:
        """Some clients write `\\/`, as JSON allows."""
        assert self._sink is not None
        if chunk[place : place + 1] != b"/":
            raise _malformed()
        await self._sink.take(b"/")
        self._state = self._medium
        return place + 1


def _malformed() -> InvalidFieldsError:
    return wrong("messages", "a data: URL is not valid base64")


def _wrong_form() -> InvalidFieldsError:
    return wrong("messages", "a data: URL must have the form data:video/...;base64,...")
