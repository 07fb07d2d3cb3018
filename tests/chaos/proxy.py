"""The links between the service's processes and Redis, which can be cut, stalled or made lossy."""

import asyncio
from asyncio import StreamReader, StreamWriter
from contextlib import suppress
from pathlib import Path

CHUNK_BYTES = 65_536


class Link:
    """One process's way to Redis: a TCP port that forwards to Redis' socket.

    While it is mended, everything passes. While it is cut, connections break and no new ones are
    made. While it is stalled, they stay open and nothing passes. While it loses replies, requests
    reach Redis and the connection breaks where a reply would come.
    """

    def __init__(self, name: str, redis_socket: Path) -> None:
        self.name = name
        self._redis_socket = redis_socket
        self._server: asyncio.Server | None = None
        self._passes = asyncio.Event()
        self._passes.set()
        self._is_cut = False
        self._loses_replies = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[StreamWriter] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    def cut(self) -> None:
        self._is_cut = True
        self.break_connections()

    def stall(self) -> None:
        self._passes.clear()

    def lose_replies(self) -> None:
        self._loses_replies = True

    def mend(self) -> None:
        self._is_cut = self._loses_replies = False
        self._passes.set()

    def break_connections(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def close(self) -> None:
        self.cut()
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.create_task(self._forward(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._writers.add(writer)
        upstream: StreamWriter | None = None
        try:
            await self._passes.wait()
            if self._is_cut:
                return
            replies, upstream = await asyncio.open_unix_connection(str(self._redis_socket))
            self._writers.add(upstream)
            pumps = [
                asyncio.create_task(self._pump(reader, upstream, is_reply=False)),
                asyncio.create_task(self._pump(replies, writer, is_reply=True)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # Redis is down, or the connection was broken
        finally:
            for end in (writer, upstream):
                if end is not None:
                    self._writers.discard(end)
                    end.transport.abort()

    async def _pump(self, reader: StreamReader, writer: StreamWriter, *, is_reply: bool) -> None:
        with suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                await self._passes.wait()
                if is_reply and self._loses_replies:
                    return
                writer.write(data)
                await writer.drain()
