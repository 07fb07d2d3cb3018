"""HTTP on one connection: uvicorn's protocols, with limits on a request's headers.

httptools parses requests if it is installed, otherwise h11. Neither closes a connection that never
sends complete headers, and httptools accepts headers of any size. Both write the head of a response
apart from its body, which costs a system call and wakes the client twice.
"""

import asyncio
from typing import Any, Protocol

from app.api.connection.strict_h11 import StrictH11Protocol

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:  # httptools is not installed
    HttpToolsProtocol = None  # type: ignore[assignment,misc]

HEADERS_TIMEOUT_S = 15.0  # for a connection to send a request's headers
MAX_HEADERS_BYTES = 64 * 1024  # of one request, including trailers; h11 has the same limit


class _Connection(Protocol):
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport

    @property
    def cycle(self) -> object: ...  # the previous request's


class HeadWithBody:
    """A transport that holds a response's head until the body begins, for a round of the event loop
    at most.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            self._loop.call_soon(self._flush)
            return
        self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head and not self._transport.is_closing():
            self._transport.write(self._head)
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class H11WithLimits(StrictH11Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(HeadWithBody(transport, self.loop))  # type: ignore[arg-type]
        _expect_request(self)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        _expect_request(self)


if HttpToolsProtocol is None:
    HTTP_PROTOCOL: type[asyncio.Protocol] = H11WithLimits
else:

    class HttpToolsWithLimits(HttpToolsProtocol):
        _is_in_headers = False
        _num_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(HeadWithBody(transport, self.loop))  # type: ignore[arg-type]
            _expect_request(self)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            _expect_request(self)

        def data_received(self, data: bytes) -> None:
            was_in_headers = self._is_in_headers
            super().data_received(data)
            if was_in_headers and self._is_in_headers:
                self._num_bytes += len(data)
                if self._num_bytes > MAX_HEADERS_BYTES and not self.transport.is_closing():
                    self.send_400_response("Request headers are too large.")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._is_in_headers, self._num_bytes = True, 0

        def on_header(self, name: bytes, value: bytes) -> None:
            self._num_bytes += len(name) + len(value)
            if self._num_bytes > MAX_HEADERS_BYTES:
                raise ValueError("request headers are too large")  # the parser's error: 400
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._is_in_headers = False
            super().on_headers_complete()

    HTTP_PROTOCOL = HttpToolsWithLimits


def _expect_request(connection: _Connection) -> None:
    connection.loop.call_later(
        HEADERS_TIMEOUT_S, _close_unless_requested, connection, connection.cycle
    )


def _close_unless_requested(connection: _Connection, last: object) -> None:
    if connection.cycle is last and not connection.transport.is_closing():
        connection.transport.close()
