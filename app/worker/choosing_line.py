"""Jobs of policy `auto` wait here for their turn: each choice is made as late as possible, and
takes the jobs behind it into account.

A job waits until those ahead of it have been chosen for, which the engine does when it has little
else to do. Dropping a job cancels the waiting task.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from app.store.queue_line import QueueLine
from app.worker.running_jobs import RunningJob
from dycoke_core.level_choice import Outlook
from dycoke_core.precedence import RANKS, Precedence


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    job: RunningJob
    queued_at: float  # on the monotonic clock
    has_turn: "asyncio.Future[None]"

    @property
    def rank(self) -> int:
        return RANKS[self.job.delivery.request.priority]


class ChoosingLine:
    """By priority and age, like what waits in the engine. Belongs to the event loop, but for
    `outlook`.
    """

    def __init__(self) -> None:
        self._queue = QueueLine()
        self._waiting: tuple[_Waiting, ...] = ()  # oldest first; replaced, as other threads read it
        self._precedence = Precedence()
        self._holders: list[_Waiting] = []  # of a turn, at most one of each priority

    def note(self, queue: QueueLine) -> None:
        """Takes in what waits in Redis, as it was just now."""
        self._queue = queue

    def is_empty_for(self, job: RunningJob) -> bool:
        """Whether none of the same or a better priority is before the job."""
        rank = RANKS[job.delivery.request.priority]
        return all(other.rank > rank for other in (*self._holders, *self._waiting))

    @asynccontextmanager
    async def turn(self, job: RunningJob) -> AsyncIterator[None]:
        """Waits for the job's turn. The turn ends when the engine has its sequence, so the next
        choice counts it.
        """
        waited_s = max(time.time() - job.delivery.queued_at_s, 0.0)
        has_turn = asyncio.get_running_loop().create_future()
        waiting = _Waiting(job, time.monotonic() - waited_s, has_turn)
        self._waiting = tuple(sorted((*self._waiting, waiting), key=_queued_at_s))
        self._call_next()
        try:
            await has_turn
            yield
        finally:
            if waiting in self._waiting:
                self._leave(waiting)
            else:
                self._holders.remove(waiting)
            self._call_next()

    def outlook(self) -> Outlook:
        """What waits behind the job whose turn it is. May be called on any thread."""
        return self._queue.outlook(tuple(waiting.queued_at for waiting in self._waiting))

    def _call_next(self) -> None:
        if not self._waiting:
            return
        ordered = self._precedence.ordered(self._waiting, lambda w: w.job.delivery.request.priority)
        if any(holder.rank <= ordered[0].rank for holder in self._holders):
            return
        self._precedence.note(is_oldest_served=ordered[0] is self._waiting[0])
        self._holders.append(ordered[0])
        self._leave(ordered[0])
        if not ordered[0].has_turn.done():  # else it is cancelled, and will call the next
            ordered[0].has_turn.set_result(None)

    def _leave(self, waiting: _Waiting) -> None:
        self._waiting = tuple(other for other in self._waiting if other is not waiting)


def _queued_at_s(waiting: _Waiting) -> float:
    return waiting.job.delivery.queued_at_s
