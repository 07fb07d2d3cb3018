"""Waits for the events of many jobs at once, over two connections.

A script that appends events announces them on a channel, by job, and usually sends them along. A
waiter that already has all earlier events gets these at once. Otherwise the log is read: one
command reads all logs that have news and a waiter. Meanwhile further news gathers, so the number of
events per read grows with the load.

Only the log is authoritative. News may be lost, so every log with a waiter is read every `POLL_S`
if there was no news of it. That also finds the events of releases without the channel.

Memory is bounded: nothing is read without a waiter, and a waiter gets one page.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis.asyncio import Redis

from app.errors import StoreUnavailableError
from app.store.client import in_our_words, shared_connection, store_call
from app.store.event_log import (
    FIRST_EVENT,
    MAX_EVENTS_PER_READ,
    LoggedEvent,
    logged_events,
    read_command,
)
from app.store.keys import RedisKeys

POLL_S = 0.25
MAX_LOGS_PER_READ = 128  # in one command, during which Redis does nothing else
LISTEN_S = 5.0  # without a message, before the connection is checked
RETRY_AFTER_S = 0.2
CONNECTIONS = 4  # one to listen, one to read, and closing ones

logger = logging.getLogger(__name__)


class EventReader:
    """One per process. Nothing is delivered unless `run` is running.

    Args:
        redis: a client that has `CONNECTIONS` to itself.
    """

    def __init__(self, redis: Redis, keys: RedisKeys) -> None:
        self._redis = redis
        self._shared = shared_connection(redis)
        self._keys = keys
        self._watches: dict[bytes, list[Watch]] = {}  # by job
        self._due: dict[Watch, None] = {}  # to be read next, in order
        self._has_due = asyncio.Event()

    @contextmanager
    def watch(self, job_id: str) -> Iterator["Watch"]:
        """Within the block the watch gives the events of one job."""
        watch = Watch(self, job_id)
        watches = self._watches.setdefault(job_id.encode(), [])
        watches.append(watch)
        try:
            yield watch
        finally:
            watch.close()
            self._due.pop(watch, None)
            watches.remove(watch)
            if not watches:
                del self._watches[job_id.encode()]

    async def run(self) -> None:
        """Reads until cancelled, also through outages of Redis."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._poll())
            tasks.create_task(self._read())

    def read_soon(self, watch: "Watch") -> None:
        self._due[watch] = None
        self._has_due.set()

    async def _listen(self) -> None:
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    async with store_call():
                        await pubsub.subscribe(self._keys.news, self._keys.ended)
                    while True:
                        async with store_call():
                            message = await pubsub.get_message(timeout=LISTEN_S)
                        if message is not None:
                            self._hear(message)
            except StoreUnavailableError:
                await asyncio.sleep(RETRY_AFTER_S)
            except Exception:
                logger.exception("could not listen for news of jobs; trying again")
                await asyncio.sleep(RETRY_AFTER_S)

    def _hear(self, message: dict[str, Any]) -> None:
        if message["type"] == "message":
            for line in message["data"].split(b"\n"):
                job_id, _, event = line.partition(b" ")
                for watch in self._watches.get(job_id, ()):
                    watch.hear(event)
        elif message["type"] == "subscribe":  # perhaps again: news may be lost
            for watch in self._all():
                watch.tell()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            for watch in self._all():
                watch.tell_if_unread()

    def _all(self) -> list["Watch"]:
        return [watch for watches in self._watches.values() for watch in watches]

    async def _read(self) -> None:
        while True:
            await self._has_due.wait()
            batch = self._take_due()
            try:
                await self._serve(batch)
            except StoreUnavailableError as error:
                _fail(batch, error)
            except Exception as error:
                await self._serve_one_by_one(batch, error)

    async def _serve(self, batch: dict[str, list["Watch"]]) -> None:
        found = await self._read_logs(batch)
        for job_id, watches in batch.items():
            for watch in watches:
                watch.give(found.get(job_id, []))

    async def _serve_one_by_one(self, batch: dict[str, list["Watch"]], error: Exception) -> None:
        """If a log cannot be read, only its own readers get the error."""
        for job_id, watches in batch.items():
            alone = {job_id: watches}
            try:
                if len(batch) == 1:
                    raise error
                await self._serve(alone)
            except Exception as its_error:
                _fail(alone, its_error)

    def _take_due(self) -> dict[str, list["Watch"]]:
        """Watches by job. Those of one job have the same position; others are left for later."""
        batch: dict[str, list[Watch]] = {}
        for watch in list(self._due):
            others = batch.get(watch.job_id)
            if others is None and len(batch) == MAX_LOGS_PER_READ:
                break
            if others and others[0].after != watch.after:
                continue
            del self._due[watch]
            if watch.begin_reading():
                batch.setdefault(watch.job_id, []).append(watch)
        if not self._due:
            self._has_due.clear()
        return batch

    async def _read_logs(self, batch: dict[str, list["Watch"]]) -> dict[str, list[LoggedEvent]]:
        if not batch:
            return {}
        places = {self._keys.events(job_id): watches[0].after for job_id, watches in batch.items()}
        with in_our_words:
            reply = await self._shared.call(*read_command(places))
        found = {key: logged_events(entries) for key, entries in reply or ()}
        return {
            job_id: found[key]
            for job_id, name in zip(batch, places, strict=True)
            if (key := name.encode()) in found
        }


class Watch:
    """One reader of one job's log. One call of `next` at a time."""

    def __init__(self, reader: EventReader, job_id: str) -> None:
        self.job_id = job_id
        self.after = FIRST_EVENT  # id of the event before the next one wanted
        self._reads_from = FIRST_EVENT  # the same, when the last reading began
        self._given: list[LoggedEvent] = []  # since `next` was called
        self._last_id = FIRST_EVENT  # id of the last of them, or `after`
        self._next_index = b""  # index of the next token, if nothing else can come next
        self._returned = ""  # id of the last event that `next` has returned
        self._reader = reader
        self._loop = asyncio.get_running_loop()
        self._may_have_news = True
        self._was_read = False  # since the last poll
        self._waiter: asyncio.Future[None] | None = None
        self._is_being_read = False
        self._is_looked_at = False  # since `next` was called
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def next(self, *, after: str, timeout_s: float) -> list[LoggedEvent]:
        """Returns the next events after `after`, or waits for one.

        Returns:
            At most `MAX_EVENTS_PER_READ` events in order; none when the time is over, but not
            before the log was looked at.

        Raises:
            StoreUnavailableError
        """
        self._waiter = self._loop.create_future()
        self._is_looked_at = False
        self.after = after
        self._given = []
        self._set_place(after)
        self._set_timer(self._loop.time() + timeout_s)
        if self._may_have_news or after != self._returned:
            self._reader.read_soon(self)
        try:
            await self._waiter
        except BaseException:
            self._may_have_news = True  # events that it was given are lost now
            raise
        finally:
            self._waiter = None
        self._returned = self._given[-1].id if self._given else after
        return self._given

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    @property
    def is_waited_for(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def hear(self, event: bytes) -> None:
        """Takes news of the log, and perhaps the new event, as `append.lua` sends it."""
        if event and self._waiter is not None and self._takes(self._waiter, event):
            self._may_have_news, self._was_read = False, True
        else:
            self.tell()

    def _takes(self, waiter: asyncio.Future[None], news: bytes) -> bool:
        """Gives an announced event to its waiters if it is their next one, or follows what they
        were just given."""
        before, own, data = news.split(b" ", 2)
        # What comes next by its index may follow a status that is still to be read.
        has_all = not self._may_have_news and not self._is_being_read
        follows = before.decode() == self._last_id or (has_all and before == self._next_index)
        has_room = len(self._given) < MAX_EVENTS_PER_READ
        if not follows or not has_room or (waiter.done() and not self._given):
            return False
        event_id = own.decode()
        self._give(waiter, [LoggedEvent(event_id if "-" in event_id else f"{event_id}-0", data)])
        return True

    def _give(self, waiter: asyncio.Future[None], events: list[LoggedEvent]) -> None:
        self._given += events
        if events:
            self._set_place(events[-1].id)
        if not waiter.done():
            waiter.set_result(None)

    def _set_place(self, event_id: str) -> None:
        self._last_id = event_id
        self._next_index = b"" if event_id == FIRST_EVENT else event_id.partition("-")[0].encode()

    def tell(self) -> None:
        """Notes that there may be something new in the log."""
        self._may_have_news = True
        if self.is_waited_for:
            self._reader.read_soon(self)

    def tell_if_unread(self) -> None:
        if not self._was_read:
            self.tell()
        self._was_read = False

    def begin_reading(self) -> bool:
        """Returns whether anybody waits for the result of the reading."""
        if not self.is_waited_for:
            return False
        self._was_read = self._is_being_read = True
        self._may_have_news = False
        self._reads_from = self.after
        return True

    def give(self, events: list[LoggedEvent]) -> None:
        """Takes the result of a reading."""
        self._is_being_read = False
        if self._waiter is None or self._waiter.done() or self.after != self._reads_from:
            self.tell()  # the one that it was read for has moved on
            return
        self._is_looked_at = True
        if len(events) == MAX_EVENTS_PER_READ:
            self._may_have_news = True
        if events or self._loop.time() >= self._deadline:
            self._give(self._waiter, events)

    def fail(self, error: Exception) -> None:
        self._is_being_read = False
        self._may_have_news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    def _set_timer(self, deadline: float) -> None:
        """Setting a timer costs more than a token, so one that fires too soon is set again."""
        self._deadline = deadline
        if self._timer is not None and self._timer.when() > deadline:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(deadline, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        if not self.is_waited_for:
            return
        if self._loop.time() < self._deadline:
            self._set_timer(self._deadline)
        elif self._is_looked_at:
            assert self._waiter is not None
            self._give(self._waiter, [])
        elif not self._is_being_read:
            self.tell()  # the reading answers, now that the time is over


def _fail(batch: dict[str, list[Watch]], error: Exception) -> None:
    for watches in batch.values():
        for watch in watches:
            watch.fail(error)
