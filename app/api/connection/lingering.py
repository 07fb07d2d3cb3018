"""ASGI middleware: an answer sent before the request's body is read still reaches the client.

If a socket with unread bytes is closed, the kernel resets the connection, and a client that is
still sending its video loses the 429 or 413 that we have sent. So, as nginx does, we send the whole
answer, then read and drop what the client still sends for a while, then close the connection.
"""

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER_S = 10.0  # in total
LINGER_IDLE_S = 2.0  # without a byte


class LingeringClose:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        body = _Body(receive)

        async def lingering_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                if not body.is_read:
                    MutableHeaders(scope=message)["Connection"] = "close"
                await send(message)
            elif message.get("more_body", False) or body.is_read:
                await send(message)
            else:
                await send({**message, "more_body": True})
                await body.drop()
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, body.receive, lingering_send)


class _Body:
    """The request's side of a connection; knows whether more of the body is to come."""

    def __init__(self, receive: Receive) -> None:
        self.is_read = False
        self._receive = receive

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self.is_read = True
        return message

    async def drop(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while not self.is_read:
                    async with asyncio.timeout(LINGER_IDLE_S):
                        await self.receive()


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
