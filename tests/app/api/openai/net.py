"""A network for one test: names, addresses, and one server that answers whatever is dialled."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpcore

from app.api.openai.fetching import MediaFetcher

VIDEO = bytes(range(256)) * 40
OWNER = "key_a"
PUBLIC, OTHER = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
RESOLVED = {
    "cdn.example.com": [PUBLIC],
    "both.example.com": [OTHER, PUBLIC],
    "inside.example.com": ["10.0.0.7"],
    "half.example.com": [PUBLIC, "127.0.0.1"],
    "nowhere.example.com": [],
    "example.com": [PUBLIC],
    "xn--bcher-kva.example.com": [PUBLIC],
    # As a resolver of the C library's answers for them.
    "2130706433": ["127.0.0.1"],
    "0x7f.1": ["127.0.0.1"],
    "127.1": ["127.0.0.1"],
    "0177.0.0.1": ["127.0.0.1"],
    "0x7f000001": ["127.0.0.1"],
    "0": ["0.0.0.0"],
    "127.0.0.1.": ["127.0.0.1"],
    "169.254.169.254.": ["169.254.169.254"],
    "localhost": ["::1", "127.0.0.1"],
    "localhost.": ["::1", "127.0.0.1"],
}

Send = Callable[[bytes], Awaitable[None]]
Page = bytes | Callable[[Send], Awaitable[None]]  # all that is answered, or what answers
Write = Callable[[bytes], Awaitable[None]]


def response(status: str, *headers: str, body: bytes = b"") -> bytes:
    lines = "\r\n".join([f"HTTP/1.1 {status}", *headers, "Connection: close"])
    return lines.encode() + b"\r\n\r\n" + body


def redirect(location: str) -> bytes:
    return response("302 Found", f"Location: {location}", "Content-Length: 0")


class Net:
    """A resolver and a dialer; all that is dialled leads to one server."""

    def __init__(self, port: int, heads: Sequence[bytes]) -> None:
        self._port = port
        self.heads = heads  # of the requests that have come
        self.dialled: list[tuple[str, int]] = []
        self.timeouts: list[float | None] = []  # of dialling
        self.refused: set[str] = set()
        self.answers: dict[str, list[Sequence[str]]] = {}  # one after another, then RESOLVED

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        if self.answers.get(host):
            return self.answers[host].pop(0)
        return RESOLVED.get(host, [host])

    async def dial(
        self, address: str, port: int, timeout: float | None
    ) -> httpcore.AsyncNetworkStream:
        self.dialled.append((address, port))
        self.timeouts.append(timeout)
        if address in self.refused:
            raise httpcore.ConnectError("refused")
        return await httpcore.AnyIOBackend().connect_tcp("127.0.0.1", self._port, timeout)


@asynccontextmanager
async def running_net(pages: Mapping[str, Page]) -> AsyncIterator[Net]:
    serving: list[asyncio.Task[None] | None] = []
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())

        async def send(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        try:
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"\r\nHost: " in head
            heads.append(head)
            page = pages.get(head.split(b" ", 2)[1].decode(), response("404 Not Found"))
            await (send(page) if isinstance(page, bytes) else page(send))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has enough
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        try:
            yield Net(server.sockets[0].getsockname()[1], heads)
        finally:
            for task in serving:
                assert task is not None
                task.cancel()


async def fetch(
    net: Net,
    url: str,
    *domains: str,
    folder: Path | None = None,
    max_bytes: int = 10**6,
) -> bytes:
    got = bytearray()

    async def write(data: bytes) -> None:
        got.extend(data)
        assert len(got) <= max_bytes

    fetcher = MediaFetcher(domains, folder, max_bytes=max_bytes, resolve=net.resolve, dial=net.dial)
    await fetcher.fetch(url, "here", write, owner=OWNER)
    return bytes(got)
