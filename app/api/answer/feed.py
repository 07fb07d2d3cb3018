"""A job's events for one reader: first those in the log, then new ones, to the end.

Durable events come exactly once and in order, from the log. Status events show where the job is
now: from the log only one that no other event follows, and the place in the queue from the job's
record. If Redis is down, the feed retries until the job's deadline, then resumes.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import NamedTuple

from app.errors import JobLostError, JobNotFoundError, StoreUnavailableError
from app.messages import (
    EVENT_ADAPTER,
    FINAL_EVENTS,
    DoneEvent,
    ErrorEvent,
    Event,
    JobState,
    StatusEvent,
    event_type,
)
from app.store.event_log import FIRST_EVENT, MAX_EVENTS_PER_READ, LoggedEvent
from app.store.event_reader import EventReader, Watch
from app.store.job_queue import JobQueue, JobRecord

POSITION_POLL_S = 0.5
MIN_PATIENCE_S = 10.0  # for Redis, whatever the job's deadline
RETRY_S = 0.5
AT_ONCE_S = 0.001


OPENING = "job"
STATUS = "status"
FINAL_TYPES = ("done", "error")


class FeedItem(NamedTuple):
    """One event as JSON: bytes from the log, or of an event that only this feed has."""

    type: str
    data: bytes  # JSON on one line
    durable_id: str | None = None

    @classmethod
    def of(cls, event: Event, durable_id: str | None = None) -> "FeedItem":
        return cls(event.type, event.model_dump_json().encode(), durable_id)

    @property
    def event(self) -> Event:
        return EVENT_ADAPTER.validate_json(self.data)


class JobFeed:
    """Follows one job.

    Args:
        record: the job as it was just now.
        after: id of the last durable event that the reader has seen.
        opening: the job's first event, if it is known and the reader has seen none.
        heartbeat_s: an empty batch comes after this much silence.
    """

    def __init__(
        self,
        queue: JobQueue,
        reader: EventReader,
        record: JobRecord,
        *,
        after: str = FIRST_EVENT,
        opening: LoggedEvent | None = None,
        heartbeat_s: float,
    ) -> None:
        self.job_id = record.job_id
        self._queue = queue
        self._reader = reader
        self._record = record
        self._after = after
        self._opening = opening
        self._heartbeat_s = heartbeat_s
        self._last_batch_at = time.monotonic()
        self._last_position: int | None = None
        self._outage_began_at_s: float | None = None  # Unix time

    async def batches(self) -> AsyncGenerator[Sequence[FeedItem], None]:
        """Yields events as they arrive; the last batch ends with a final event.

        Ends without one where `after` was the final event's id.
        """
        with self._reader.watch(self.job_id) as watch:
            if self._opening is not None and self._after == FIRST_EVENT:
                self._after = self._opening.id
                yield _items([self._opening])
            while True:
                batch, is_end = await self._next_or_why_not(watch)
                is_due = time.monotonic() - self._last_batch_at >= self._heartbeat_s
                if batch or (is_due and not is_end):
                    yield batch
                    self._last_batch_at = time.monotonic()
                if is_end:
                    return

    async def _next_or_why_not(self, watch: Watch) -> tuple[list[FeedItem], bool]:
        try:
            batch, is_end = await self._next(watch)
            self._outage_began_at_s = None
        except StoreUnavailableError as error:
            return await self._sit_out(error)
        except JobNotFoundError:
            lost = JobLostError("the job's record is gone: post the request again")
            return [FeedItem.of(ErrorEvent.of(lost, self.job_id))], True
        return batch, is_end

    async def _next(self, watch: Watch) -> tuple[list[FeedItem], bool]:
        was_ended = self._record.state.is_final
        logged = await watch.next(after=self._after, timeout_s=self._timeout_s())
        if not logged:
            if was_ended:
                return [], True
            self._record = await self._queue.refreshed(self._record)
            return self._position(), False
        items = _items(logged)
        is_end = items[-1].type in FINAL_TYPES
        was_waiting = self._record.state is not JobState.RUNNING
        if not is_end and was_waiting and any(map(_is_from_worker, items)):
            await self._note_worker()
        # Comes last, so that what fails before it is read again.
        self._after = logged[-1].id
        return _without_stale(items), is_end

    async def _note_worker(self) -> None:
        """Notes that a worker has the job, unless it has given it back since."""
        if self._record.attempts == 0:
            self._record = replace(self._record, state=JobState.RUNNING, attempts=1, position=None)
        else:
            self._record = await self._queue.refreshed(self._record)

    def _timeout_s(self) -> float:
        is_running = self._record.state is JobState.RUNNING
        if not is_running and self._record.state.is_final:
            return AT_ONCE_S
        until_heartbeat_s = self._last_batch_at + self._heartbeat_s - time.monotonic()
        if not is_running:
            until_heartbeat_s = min(until_heartbeat_s, POSITION_POLL_S)
        return max(until_heartbeat_s, AT_ONCE_S)

    def _position(self) -> list[FeedItem]:
        position = self._record.position
        if position == self._last_position:
            return []
        self._last_position = position
        if position is None:
            return []
        return [FeedItem.of(StatusEvent(stage="queued", position=position))]

    async def _sit_out(self, error: StoreUnavailableError) -> tuple[list[FeedItem], bool]:
        now = time.time()
        if self._outage_began_at_s is None:
            self._outage_began_at_s = now
        patience_ends_at = max(
            self._record.request.deadline_at_s, self._outage_began_at_s + MIN_PATIENCE_S
        )
        if now > patience_ends_at:
            return [FeedItem.of(ErrorEvent.of(error, self.job_id))], True
        await asyncio.sleep(RETRY_S)
        return [], False


async def final_event(
    batches: AsyncGenerator[Sequence[FeedItem], None],
) -> DoneEvent | ErrorEvent:
    """Reads a feed to its end from any position, and returns how the job ended."""
    final: FeedItem | None = None
    async with aclosing(batches):
        async for batch in batches:
            if batch:
                final = batch[-1]
    assert final is not None
    event = final.event
    assert isinstance(event, FINAL_EVENTS)
    return event


def _items(logged: Sequence[LoggedEvent]) -> list[FeedItem]:
    return [
        FeedItem(kind := event_type(data), data, None if kind == STATUS else event_id)
        for event_id, data in logged
    ]


def _is_from_worker(item: FeedItem) -> bool:
    if item.type != STATUS:
        return item.type != OPENING
    event = item.event
    return not (isinstance(event, StatusEvent) and event.stage == "reading_frames")


def _without_stale(items: list[FeedItem]) -> list[FeedItem]:
    """Leaves out statuses that another event follows."""
    durable = [item for item in items if item.type != STATUS]
    has_all = len(items) < MAX_EVENTS_PER_READ  # else more follows at once
    return [*durable, items[-1]] if has_all and items[-1].type == STATUS else durable
