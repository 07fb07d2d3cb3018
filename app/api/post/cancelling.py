"""Cancelling jobs: on request, and in the background when the client that posted one has left."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from app.api.post.reading import FrameReading
from app.errors import JobCancelledError, JobNotFoundError, StoreUnavailableError
from app.messages import ErrorEvent, JobRequest, JobState
from app.store.job_queue import JobQueue
from dycoke_core.errors import DycokeError

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0  # for Redis; after that the job ends by its deadline
RETRY_S = 0.5


class Cancellations:
    def __init__(self, queue: JobQueue, reading: FrameReading) -> None:
        self._queue = queue
        self._reading = reading
        self._tasks: set[asyncio.Task[None]] = set()

    async def cancel(self, job_id: str, reason: str, *, unless_adopted: bool = False) -> bool:
        """Ends a job wherever it is; its worker and its reader are notified.

        Args:
            unless_adopted: spares a job that a later request with its idempotency key has found.

        Returns:
            False if it had ended, or is spared.

        Raises:
            JobNotFoundError
        """
        event = ErrorEvent.of(JobCancelledError(reason), job_id)
        was_ended = await self._queue.end(
            job_id, JobState.CANCELLED, event, unless_adopted=unless_adopted
        )
        if was_ended or not unless_adopted:
            self._reading.cancel(job_id)
        return was_ended

    def start(self, job_id: str, reason: str, *, unless_adopted: bool = False) -> None:
        """Cancels a job in the background, even during an outage of Redis."""
        if not unless_adopted:
            self._reading.cancel(job_id)  # needs no Redis
        self._in_background(
            job_id, lambda: self.cancel(job_id, reason, unless_adopted=unless_adopted)
        )

    def _in_background(self, job_id: str, work: Callable[[], Awaitable[object]]) -> None:
        task = asyncio.create_task(self._persist(job_id, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def retract(self, job: JobRequest, error: DycokeError) -> None:
        """Ends, in the background, a job that may exist although its creation failed. One that a
        retry has found is left to any API to read.
        """
        event = ErrorEvent.of(error, job.job_id)
        self._in_background(job.job_id, lambda: self._retract(job, event))

    async def _retract(self, job: JobRequest, event: ErrorEvent) -> None:
        try:
            if not await self._queue.end(job.job_id, JobState.ERROR, event, unless_adopted=True):
                await self._queue.renew_place(job.model, job.job_id, lease_s=0.0)
        except JobNotFoundError:
            await self._queue.release(job.model, job.job_id)

    async def wait_until_none(self) -> None:
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _persist(self, job_id: str, work: Callable[[], Awaitable[object]]) -> None:
        give_up_at = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up_at:
            with suppress(StoreUnavailableError):
                with suppress(JobNotFoundError):
                    await work()
                return
            await asyncio.sleep(RETRY_S)
        logger.warning("a job could not be cancelled", extra={"job_id": job_id})
