"""Jobs of policy `auto` wait here for their turn: each choice is made as late as it can be, and
goes by what waits behind it.

A wait ends with the choices of the jobs before it, each of which the engine makes when it has
little else to do, or with the job's end: whoever drops a job cancels the task that waits.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.store.queue_line import QueueLine
from app.worker.running_jobs import RunningJob
from dycoke_core.level_choice import Outlook


class ChoosingLine:
    """First in, first out. Belongs to the event loop, but for `outlook`."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._queue = QueueLine()
        self._waiting: dict[str, float] = {}
        self._held_at: tuple[float, ...] = ()  # `_waiting`'s, for another thread

    def note(self, queue: QueueLine) -> None:
        """Takes in what waits in Redis, as it was just now."""
        self._queue = queue

    @property
    def is_empty(self) -> bool:
        return not self._lock.locked()

    @asynccontextmanager
    async def turn(self, job: RunningJob) -> AsyncIterator[None]:
        """Waits for the job's turn, which lasts until the engine has its sequence: the next choice
        goes by it.
        """
        waited_s = time.time() - job.delivery.queued_at_s
        self._waiting[job.sequence_id] = time.monotonic() - max(waited_s, 0.0)
        self._note_held()
        try:
            async with self._lock:
                self._leave(job)
                yield
        finally:
            self._leave(job)

    def outlook(self) -> Outlook:
        """What waits behind the job whose turn it is. May be called on any thread."""
        return self._queue.outlook(self._held_at)

    def _leave(self, job: RunningJob) -> None:
        self._waiting.pop(job.sequence_id, None)
        self._note_held()

    def _note_held(self) -> None:
        self._held_at = tuple(self._waiting.values())
