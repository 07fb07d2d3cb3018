"""Server-sent events: framing, and the response that streams a job's events to one client.

If a client reads slowly, the event log is read slowly for it, so nothing piles up here. A client
that takes nothing for `STALL_S` is treated as gone.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from enum import StrEnum
from typing import Any, Protocol, Self

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.answer.feed import FINAL_TYPES, FeedItem
from app.api.connection.disconnect import ClientLeftError, unless_disconnected
from app.api.connection.drain import Drain
from app.api.errors import INTERNAL_ERROR, incident_message, log_incident
from app.errors import ShuttingDownError
from app.messages import DoneEvent, ErrorEvent

logger = logging.getLogger(__name__)

MEDIA_TYPE = "text/event-stream"
HEARTBEAT = b": heartbeat\n\n"
STALL_S = 60.0


class Ending(StrEnum):
    COMPLETE = "complete"  # the job has ended and the client knows
    CLIENT_LEFT = "client_left"
    SHUTDOWN = "shutdown"
    FAILED = "failed"


def frame(item: FeedItem) -> bytes:
    """Frames one event. Its JSON has no line breaks; only durable events have an id."""
    kind, data, durable_id = item
    if durable_id is None:
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)
    return b"event: %b\nid: %b\ndata: %b\n\n" % (kind.encode(), durable_id.encode(), data)


class Rendering(Protocol):
    """How one surface writes a job's events. One per answer: it may remember what it has sent."""

    @property
    def heartbeat(self) -> bytes: ...

    def render(self, batch: Sequence[FeedItem]) -> bytes:
        """Empty where the surface has nothing to say of these events."""
        ...

    def interruption(self, event: ErrorEvent) -> bytes:
        """The end of a stream whose job continues."""
        ...

    def body(self, done: DoneEvent) -> dict[str, Any]:
        """The answer in one piece, as JSON."""
        ...


class JobEvents:
    """The events as they are, under their names. A client that is interrupted resumes by the
    ids."""

    heartbeat = HEARTBEAT

    def render(self, batch: Sequence[FeedItem]) -> bytes:
        return b"".join(map(frame, batch))

    def interruption(self, event: ErrorEvent) -> bytes:
        return b""

    def body(self, done: DoneEvent) -> dict[str, Any]:
        return done.model_dump(mode="json")


class EventStream(Response):
    """Streams batches of events until they end, the client leaves, or the server's drain is over.

    Args:
        batches: an empty one is a heartbeat.
        rendering: None: the events as they are.
        on_end: called once with how it ended; must not block.
    """

    media_type = MEDIA_TYPE

    def __init__(
        self,
        job_id: str,
        batches: AsyncGenerator[Sequence[FeedItem], None],
        *,
        drain: Drain,
        on_end: Callable[[Ending], None],
        rendering: Rendering | None = None,
        stall_s: float = STALL_S,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(
            {"X-Job-Id": job_id, "X-Accel-Buffering": "no", "Cache-Control": "no-store"}
        )
        self._job_id = job_id
        self._batches = batches
        self._drain = drain
        self._on_end = on_end
        self._rendering = rendering or JobEvents()
        self._stall_s = stall_s
        self._is_over = False  # the response's last byte has been sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ending = Ending.SHUTDOWN  # what it is if the server cancels us
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            ending = await self._stream(receive, send)
            if ending is not Ending.CLIENT_LEFT and not self._is_over:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._on_end(ending)

    async def _stream(self, receive: Receive, send: Send) -> Ending:
        try:
            async with self._drain.until_expired():
                await unless_disconnected(receive, self._pump(send))
            return Ending.COMPLETE
        except ClientLeftError:
            return Ending.CLIENT_LEFT
        except ShuttingDownError as error:
            event = ErrorEvent.of(error, self._job_id)
            await self._send_last(send, self._rendering.interruption(event))
            return Ending.SHUTDOWN
        except Exception as error:  # the headers are out, so the client gets an event
            incident = log_incident(error, job_id=self._job_id)
            event = ErrorEvent(
                code=INTERNAL_ERROR,
                message=incident_message(incident),
                retryable=False,
                job_id=self._job_id,
            )
            await self._send_last(send, self._rendering.render([FeedItem.of(event)]))
            return Ending.FAILED

    async def _send_last(self, send: Send, chunk: bytes) -> None:
        """Sends bytes that may be lost."""
        with suppress(ClientLeftError, TimeoutError):
            async with asyncio.timeout(self._stall_s):
                if chunk:
                    await _send(send, chunk)

    async def _pump(self, send: Send) -> None:
        rendering = self._rendering
        try:
            async with asyncio.timeout(None) as limit, aclosing(self._batches) as batches:
                with _StallTimer(limit, self._stall_s) as timer:
                    async for batch in batches:
                        is_end = bool(batch) and batch[-1].type in FINAL_TYPES
                        timer.start()
                        chunk = rendering.render(batch) or rendering.heartbeat
                        await _send(send, chunk, is_last=is_end)
                        timer.stop()
                        if is_end:
                            # At once: for anyone watching the connection it ends here.
                            self._is_over = True
                            return
        except TimeoutError:
            if limit.expired():
                raise ClientLeftError from None
            raise


class _StallTimer:
    """Ends a block in which something that is started is not stopped for so long.

    Starting it costs next to nothing: the event loop's timer is set once per `stall_s`, not once
    per token.
    """

    def __init__(self, limit: asyncio.Timeout, stall_s: float) -> None:
        self._limit = limit
        self._stall_s = stall_s
        self._loop = asyncio.get_running_loop()
        self._started_at: float | None = None

    def start(self) -> None:
        self._started_at = self._loop.time()

    def stop(self) -> None:
        self._started_at = None

    def __enter__(self) -> Self:
        self._handle = self._loop.call_later(self._stall_s, self._check)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._handle.cancel()

    def _check(self) -> None:
        now = self._loop.time()
        ends_at = (now if self._started_at is None else self._started_at) + self._stall_s
        if now < ends_at:
            self._handle = self._loop.call_at(ends_at, self._check)
        else:
            self._limit.reschedule(now)


async def _send(send: Send, chunk: bytes, *, is_last: bool = False) -> None:
    try:
        await send({"type": "http.response.body", "body": chunk, "more_body": not is_last})
    except OSError:
        raise ClientLeftError from None
