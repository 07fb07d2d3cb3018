"""Cancelling jobs: on request, and in the background when the client that posted one has left."""

import asyncio
import logging
import time
from contextlib import suppress

from app.api.post.reading import FrameReading
from app.errors import JobCancelledError, JobNotFoundError, StoreUnavailableError
from app.messages import ErrorEvent, JobState
from app.store.job_queue import JobQueue

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0  # with Redis; afterwards the job ends by its deadline
RETRY_S = 0.5


class Cancellations:
    def __init__(self, queue: JobQueue, reading: FrameReading) -> None:
        self._queue = queue
        self._reading = reading
        self._tasks: set[asyncio.Task[None]] = set()

    async def cancel(self, job_id: str, reason: str, *, unless_adopted: bool = False) -> bool:
        """Ends a job wherever it is; its worker and its reader are told.

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
        """Cancels a job in the background, through an outage of Redis."""
        if not unless_adopted:
            self._reading.cancel(job_id)  # needs no Redis
        task = asyncio.create_task(self._persist(job_id, reason, unless_adopted=unless_adopted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait_until_none(self) -> None:
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _persist(self, job_id: str, reason: str, *, unless_adopted: bool) -> None:
        give_up_at = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up_at:
            with suppress(StoreUnavailableError):
                with suppress(JobNotFoundError):
                    await self.cancel(job_id, reason, unless_adopted=unless_adopted)
                return
            await asyncio.sleep(RETRY_S)
        logger.warning("a job could not be cancelled", extra={"job_id": job_id})
