"""A job's events for one reader: what the log holds, then what comes, to the end.

Durable events come exactly once and in order, from the log. Status events show where the job is
now: of those in the log only one that nothing follows, and the place in the queue from the job's
record. An outage of Redis is sat out until the job's deadline; the feed goes on where it was.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from app.errors import JobLostError, JobNotFoundError, StoreUnavailableError
from app.messages import FINAL_EVENTS, DoneEvent, ErrorEvent, Event, JobState, StatusEvent
from app.store.event_log import FIRST_EVENT, MAX_EVENTS_PER_READ, EventLog, LoggedEvent
from app.store.job_queue import JobQueue, JobRecord

POSITION_POLL_S = 0.5
MIN_PATIENCE_S = 10.0  # with Redis, whatever the job's deadline
RETRY_S = 0.5
AT_ONCE_S = 0.001


@dataclass(frozen=True, slots=True)
class FeedItem:
    event: Event
    durable_id: str | None = None


class JobFeed:
    """Follows one job.

    Args:
        record: the job as it was just now.
        after: id of the last durable event that the reader has seen.
        heartbeat_s: an empty batch comes after so much silence.
    """

    def __init__(
        self,
        queue: JobQueue,
        log: EventLog,
        record: JobRecord,
        *,
        after: str = FIRST_EVENT,
        heartbeat_s: float,
    ) -> None:
        self.job_id = record.job_id
        self._queue = queue
        self._log = log
        self._record = record
        self._after = after
        self._heartbeat_s = heartbeat_s
        self._last_batch_at = time.monotonic()
        self._last_position: int | None = None
        self._outage_began_at_s: float | None = None  # Unix time

    async def batches(self) -> AsyncIterator[Sequence[FeedItem]]:
        """Yields events as they come; the last batch ends with a final event.

        Ends without one where `after` was the final event's id.
        """
        while True:
            try:
                batch, is_end = await self._next()
                self._outage_began_at_s = None
            except StoreUnavailableError as error:
                batch, is_end = await self._sit_out(error)
            except JobNotFoundError:
                lost = JobLostError("the job's record is gone; post it again")
                batch, is_end = [FeedItem(ErrorEvent.of(lost, self.job_id))], True
            is_due = time.monotonic() - self._last_batch_at >= self._heartbeat_s
            if batch or (is_due and not is_end):
                yield batch
                self._last_batch_at = time.monotonic()
            if is_end:
                return

    async def _next(self) -> tuple[list[FeedItem], bool]:
        was_ended = self._record.state.is_final
        logged = await self._log.read(self.job_id, after=self._after, block_s=self._block_s())
        if not logged:
            if was_ended:
                return [], True
            self._record = await self._queue.get(self.job_id)
            return self._position(), False
        is_end = isinstance(logged[-1].event, FINAL_EVENTS)
        was_waiting = self._record.state is not JobState.RUNNING
        if not is_end and was_waiting and any(map(_is_from_worker, logged)):
            self._record = await self._queue.get(self.job_id)
        # Last of all: what fails before this is read again.
        self._after = logged[-1].id
        return _without_stale(logged), is_end

    def _block_s(self) -> float:
        if self._record.state.is_final:
            return AT_ONCE_S
        until_heartbeat_s = self._last_batch_at + self._heartbeat_s - time.monotonic()
        if self._record.state is not JobState.RUNNING:
            until_heartbeat_s = min(until_heartbeat_s, POSITION_POLL_S)
        return max(until_heartbeat_s, AT_ONCE_S)

    def _position(self) -> list[FeedItem]:
        position = self._record.position
        if position == self._last_position:
            return []
        self._last_position = position
        if position is None:
            return []
        return [FeedItem(StatusEvent(stage="queued", position=position))]

    async def _sit_out(self, error: StoreUnavailableError) -> tuple[list[FeedItem], bool]:
        now = time.time()
        if self._outage_began_at_s is None:
            self._outage_began_at_s = now
        patience_ends_at = max(
            self._record.request.deadline_at_s, self._outage_began_at_s + MIN_PATIENCE_S
        )
        if now > patience_ends_at:
            return [FeedItem(ErrorEvent.of(error, self.job_id))], True
        await asyncio.sleep(RETRY_S)
        return [], False


async def final_event(batches: AsyncIterator[Sequence[FeedItem]]) -> DoneEvent | ErrorEvent:
    """Reads a feed from anywhere before its end to its end, and returns how it ended."""
    final: Event | None = None
    async for batch in batches:
        if batch:
            final = batch[-1].event
    assert isinstance(final, FINAL_EVENTS)
    return final


def _is_from_worker(logged: LoggedEvent) -> bool:
    event = logged.event
    return not (isinstance(event, StatusEvent) and event.stage == "reading_frames")


def _without_stale(logged: Sequence[LoggedEvent]) -> list[FeedItem]:
    """Leaves out statuses that something follows."""
    items = [
        FeedItem(entry.event, entry.id)
        for entry in logged
        if not isinstance(entry.event, StatusEvent)
    ]
    has_all = len(logged) < MAX_EVENTS_PER_READ  # else more follows at once
    if has_all and isinstance(logged[-1].event, StatusEvent):
        items.append(FeedItem(logged[-1].event))
    return items
