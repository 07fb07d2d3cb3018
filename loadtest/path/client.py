"""Clients of one API in a separate process: `python -m loadtest.path.client` takes orders as lines
of JSON on standard input and answers with lines of JSON.

They do as little as possible while the others are measured: what arrives is stored with its time,
then parsed and checked after the last byte.
"""

import asyncio
import json
import re
import sys
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from loadtest.client import CHAT

PATIENCE_S = 120.0
AT_ONCE = 32  # connections that are being opened
# A frame never lies across two chunks of the response.
TOKEN = re.compile(rb'data: \{"type":"token",[^\n]*?"token_ids":\[([0-9,]*)\]')


class AnswerError(Exception):
    """An answer that is not what the engine made."""


@dataclass
class Stream(asyncio.Protocol):
    """One connection that asks one question."""

    request: bytes
    chunks: list[bytes] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.has_token: asyncio.Future[None] = loop.create_future()
        self.is_over: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.chunks.append(data)
        self.times_s.append(time.monotonic())
        if not self.has_token.done() and b"event: token" in data:
            self.has_token.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        for future in (self.has_token, self.is_over):
            if not future.done():
                future.set_result(None)

    @property
    def is_refused(self) -> bool:
        return self.chunks[:1] != [] and self.chunks[0].startswith(
            (b"HTTP/1.1 503", b"HTTP/1.1 429")
        )

    def tokens(self) -> list[tuple[float, int]]:
        """When each token event arrived, and how many tokens it had.

        Raises:
            AnswerError: the ids are not 0, 1, 2, ...
        """
        text = b"".join(self.chunks)
        if not text.startswith(b"HTTP/1.1 200"):
            raise AnswerError(text[:400].decode(errors="replace"))
        ends, length = [], 0
        for chunk in self.chunks:
            length += len(chunk)
            ends.append(length)
        found, expected = [], 0
        for match in TOKEN.finditer(text):
            ids = [int(token_id) for token_id in match[1].split(b",")]
            if ids != list(range(expected, expected + len(ids))):
                raise AnswerError(f"expected token {expected}, got {ids}")
            expected += len(ids)
            found.append((self.times_s[bisect_left(ends, match.end())], len(ids)))
        return found


class _Clients:
    def __init__(self, url: str, num_streams: int) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._num_streams = num_streams

    async def ask(self, fields: dict[str, Any]) -> Stream:
        body = json.dumps(fields).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_connection(
            lambda: Stream(head.encode() + body), self._host, self._port
        )
        return stream

    async def stream(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Opens all streams, reports once each has a token, and keeps reading until stopped.

        Returns:
            What arrived in the window that the order to stop names.
        """
        streams: list[Stream] = []
        for first in range(0, self._num_streams, AT_ONCE):
            number = min(AT_ONCE, self._num_streams - first)
            opened = [await self.ask(fields) for _ in range(number)]
            await asyncio.gather(*(stream.has_token for stream in opened))
            streams += opened
        _say({"started_at_s": time.monotonic()})
        order = json.loads(await asyncio.to_thread(sys.stdin.readline))
        for stream in streams:
            stream.transport.abort()
        counts = [
            count
            for stream in streams
            for at_s, count in stream.tokens()
            if order["from_s"] <= at_s < order["to_s"]
        ]
        return {"events": len(counts), "tokens": sum(counts)}

    async def request(self, fields: dict[str, Any], number: int) -> dict[str, Any]:
        """Asks `number` questions, as many at a time as there are streams, each to its end."""
        left, num_refused = number, 0

        async def one_after_another() -> None:
            nonlocal left, num_refused
            while left > 0:
                left -= 1
                stream = await self.ask(fields)
                await stream.is_over
                if stream.is_refused:  # more at a time than it takes: as it asks, later again
                    left, num_refused = left + 1, num_refused + 1
                    await asyncio.sleep(1)
                elif sum(count for _, count in stream.tokens()) != fields["max_tokens"]:
                    raise AnswerError("an answer lacks tokens")

        began_at = time.monotonic()
        await asyncio.gather(*(one_after_another() for _ in range(self._num_streams)))
        wall_s = time.monotonic() - began_at
        return {"requests": number, "refused": num_refused, "wall_s": wall_s}


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


async def _obey(order: dict[str, Any]) -> dict[str, Any]:
    clients = _Clients(order["url"], order["streams"])
    async with asyncio.timeout(PATIENCE_S):
        if order["requests"]:
            return await clients.request(order["fields"], order["requests"])
        return await clients.stream(order["fields"])


if __name__ == "__main__":
    while line := sys.stdin.readline():
        _say(asyncio.run(_obey(json.loads(line))))
