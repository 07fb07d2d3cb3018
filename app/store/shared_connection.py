"""One connection to Redis for all of a process's short calls.

A pool gives each call its own connection, which costs several times as much as the call itself.
Here calls are sent in the order in which they come, those of one round of the event loop together,
and replies come back in that order; no call waits for another's reply before it is sent. Calls that
block or are large belong on their own connection, or every other call would wait for them.

Redis holds a reply until it is sent, even if the caller has gone. So only a few calls with large
replies are sent at a time, and such a call is not sent at all if its caller has gone by then.

Every call ends: with its reply, or with an error after `timeout_s` or when its connection was lost
`MAX_LOSSES` times. Until then it is sent again, so it must be safe to send twice. A connection that
leaves a call unanswered for `timeout_s` is given up.
"""

import asyncio
import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

MAX_LOSSES = 3

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Call:
    command: list[bytes]
    reply: asyncio.Future[Any]
    timer: asyncio.TimerHandle  # until it has been answered or has failed, even if no one waits
    num_losses: int = 0

    def answer(self, reply: Any) -> None:
        self.timer.cancel()
        if not self.reply.done():
            self.reply.set_result(reply)

    def fail(self, error: Exception) -> None:
        self.timer.cancel()
        if not self.reply.done():
            self.reply.set_exception(error)


class SharedConnection:
    """Connects with the first call.

    Args:
        connection: used by nothing else.
        max_unanswered: calls sent and not answered yet; None: any number.
    """

    def __init__(
        self,
        connection: AbstractConnection,
        *,
        timeout_s: float,
        max_unanswered: int | None = None,
    ) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._max_unanswered = max_unanswered
        self._unsent: deque[_Call] = deque()
        self._unanswered: deque[_Call] = deque()
        self._has_unsent = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None

    async def call(self, *args: str | bytes | int | float) -> Any:
        """Sends one command; returns its reply as Redis gives it.

        Raises:
            ResponseError: Redis replied with an error.
            ConnectionError, redis' TimeoutError: it may have been carried out, or may not.
        """
        command = self._connection.pack_command(*args)
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        timer = loop.call_later(self._timeout_s, self._give_up, reply)
        self._unsent.append(_Call(command, reply, timer))
        self._has_unsent.set()
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await reply

    async def aclose(self) -> None:
        """Ends the connection, and the calls that are under way. The next one connects again."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None
        for call in self._take_all():
            call.fail(ConnectionError("the connection was closed"))

    async def _run(self) -> None:
        while True:
            await self._has_unsent.wait()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._connection.connect()  # type: ignore[no-untyped-call]
                await self._serve()
            except (RedisError, OSError, TimeoutError) as error:
                self._lose(error)
            except Exception as error:
                logger.exception("the connection to Redis failed")
                self._lose(error)
            finally:
                await self._connection.disconnect(nowait=True)

    async def _serve(self) -> None:
        """Raises what ends the connection."""
        self._reading = asyncio.create_task(self._read())
        tasks = (self._reading, asyncio.create_task(self._write()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._reading = None
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        raise RedisTimeoutError("Redis does not answer")

    async def _write(self) -> None:
        while True:
            await self._has_unsent.wait()
            self._has_unsent.clear()
            if not self._is_full:
                await self._connection.send_packed_command(self._take_unsent(), check_health=False)

    @property
    def _is_full(self) -> bool:
        return len(self._unanswered) == self._max_unanswered

    def _take_unsent(self) -> list[bytes]:
        commands: list[bytes] = []
        while self._unsent and not self._is_full:
            call = self._unsent.popleft()
            if call.reply.done():  # the caller has gone
                call.timer.cancel()
            else:
                self._unanswered.append(call)
                commands += call.command
        return commands

    async def _read(self) -> None:
        while True:
            try:
                reply = await self._connection.read_response()
            except ResponseError as error:
                self._next_unanswered().fail(error)
            else:
                self._next_unanswered().answer(reply)
                del reply  # it may be large, and the next may be long in coming

    def _next_unanswered(self) -> _Call:
        if not self._unanswered:
            raise ConnectionError("a reply that nobody has asked for")
        if self._unsent:
            self._has_unsent.set()
        return self._unanswered.popleft()

    def _give_up(self, reply: asyncio.Future[Any]) -> None:
        """A call's time is over. If it was sent the connection is dead, or as good as dead."""
        if not reply.done():
            reply.set_exception(RedisTimeoutError("Redis does not answer"))
        if self._reading is not None and any(c.reply is reply for c in self._unanswered):
            self._reading.cancel()

    def _lose(self, error: Exception) -> None:
        """The connection is gone, or could not be made."""
        for call in self._take_all():
            call.num_losses += 1
            if call.reply.done() or call.num_losses == MAX_LOSSES:
                call.fail(ConnectionError(str(error)))
            else:
                self._unsent.append(call)
        if self._unsent:
            self._has_unsent.set()

    def _take_all(self) -> list[_Call]:
        calls = [*self._unanswered, *self._unsent]
        self._unanswered.clear()
        self._unsent.clear()
        self._has_unsent.clear()
        return calls
