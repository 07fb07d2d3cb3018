"""The line in which jobs of policy `auto` wait for their choice, which is made as late as possible
and takes the jobs behind into account.

A job waits until the engine has chosen for those ahead of it, which it does when it has little else
to do. If a job's prefix becomes available meanwhile, the job costs the engine only its question, so
it is called out of turn. Dropping a job cancels the waiting task.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from app.store.queue_snapshot import QueueSnapshot
from app.worker.running_jobs import RunningJob
from dycoke_core.level_choice import Outlook
from dycoke_core.precedence import RANKS, Precedence

MAX_REPLY_LAG_MS = 10_000  # how late a reply may be; if it is later, a clock was set back
MAX_TAKEN = 64  # jobs remembered until a newer state of the queue is known

Passes = Callable[[], Awaitable[bool]]


@dataclass(slots=True, eq=False)
class _Waiting:
    job: RunningJob
    prefix_keys: frozenset[str]
    is_chosen_for: bool
    has_turn: bool = False
    is_called: asyncio.Event = field(default_factory=asyncio.Event)  # has a turn, or a prefix

    @property
    def rank(self) -> int:
        return _rank(self.job)


class _Taken(NamedTuple):
    """When a job was queued and when a worker was given it, by Redis's clock."""

    queued_ms: int
    started_ms: int


async def _never_passes() -> bool:
    return False


class ChoosingLine:
    """Ordered by priority and age, like the engine's own queue. Belongs to the event loop, except
    `outlook`.
    """

    def __init__(self) -> None:
        self._queue = QueueSnapshot()
        # Those that the engine does not have yet, by when they were queued, on the monotonic clock:
        # prepared, waiting or chosen for. Replaced, as other threads read it.
        self._held: dict[RunningJob, float] = {}
        self._waiting: tuple[_Waiting, ...] = ()  # oldest first
        self._taken: list[_Taken] = []  # the last ones, taken since the known state of the queue
        self._precedence = Precedence()
        self._holders: tuple[_Waiting, ...] = ()  # of a turn
        self._can_choose = True

    def note(self, queue: QueueSnapshot) -> None:
        """Takes in what waits in Redis, as it was just now. Replies may overtake each other: what
        an older one says, or one from before a job was taken, is not counted again.
        """
        if 0 < self._queue.now_ms - queue.now_ms < MAX_REPLY_LAG_MS:
            return
        self._taken = [taken for taken in self._taken if taken.started_ms >= queue.now_ms]
        for taken in self._taken:
            queue = queue.without(taken.queued_ms)
        self._queue = queue

    def note_taken(self, job: RunningJob) -> None:
        """Notes that a job no longer waits in Redis. `note_left` has to follow."""
        delivery = job.delivery
        waited_s = max(time.time() - delivery.waits_since_s, 0.0)
        self._held = {**self._held, job: time.monotonic() - waited_s}
        taken = _Taken(round(delivery.queued_at_s * 1000), round(delivery.started_at_s * 1000))
        self._taken = [*self._taken[-MAX_TAKEN:], taken]
        self._queue = self._queue.without(taken.queued_ms)
        if delivery.queue is not None:
            self.note(delivery.queue)

    def note_left(self, job: RunningJob) -> None:
        """Notes that the engine has got a job that was taken, or never will."""
        self._held = {other: at for other, at in self._held.items() if other is not job}

    def note_prefix(self, key: str) -> None:
        """Calls the jobs that may use a prefix that has just become available in the engine."""
        for waiting in self._waiting:
            if key in waiting.prefix_keys:
                waiting.is_called.set()

    def note_store(self, *, can_choose: bool) -> None:
        """Takes in whether choices can be stored. While they cannot, jobs that are to be chosen for
        keep no others waiting.
        """
        self._can_choose = can_choose
        self._call_next()

    def is_empty_for(self, job: RunningJob) -> bool:
        """Whether a job with a known compression need not wait for any other."""
        waiting = _Waiting(job, frozenset(), is_chosen_for=False)
        others = (*self._holders, *self._waiting)
        return not any(self._goes_before(other, waiting) for other in others)

    @asynccontextmanager
    async def turn(
        self,
        job: RunningJob,
        prefix_keys: frozenset[str] = frozenset(),
        passes: Passes = _never_passes,
        *,
        is_chosen_for: bool = True,
    ) -> AsyncIterator[None]:
        """Waits for the job's turn. The turn ends when the engine has its sequence, so the next
        choice counts it.

        Args:
            prefix_keys: of the prefixes that the job may take.
            passes: asked when one of these comes; if it says so, the job leaves the line at once.
            is_chosen_for: in this turn; else its compression is known.
        """
        waiting = _Waiting(job, prefix_keys, is_chosen_for)
        self._waiting = tuple(sorted((*self._waiting, waiting), key=_queued_at_s))
        self._call_next()
        try:
            if await _passes_by(waiting, passes):
                self._let_go(waiting)
            yield
        finally:
            self._let_go(waiting)

    def outlook(self, job: RunningJob) -> Outlook:
        """What waits with a job that is chosen for: in Redis, and here, where some are still being
        prepared. Those of worse priority give way, so they do not count. May be called on any
        thread.
        """
        rank = _rank(job)
        held = self._held.items()
        others = (at for other, at in held if other is not job and _rank(other) <= rank)
        return self._queue.outlook(tuple(sorted(others)), worst_rank=rank)

    def _call_next(self) -> None:
        """Calls all jobs that may have a turn now."""
        while called := self._next():
            self._precedence.note(is_oldest_served=called is self._waiting[0])
            self._waiting = _without(called, self._waiting)
            self._holders = (*self._holders, called)
            called.has_turn = True
            called.is_called.set()

    def _next(self) -> _Waiting | None:
        """The first in order that no holder keeps waiting: one that is kept waiting holds up none
        that is not.
        """
        ordered = self._precedence.ordered(self._waiting, lambda w: w.job.delivery.request.priority)
        return next((waiting for waiting in ordered if not self._is_kept_waiting(waiting)), None)

    def _is_kept_waiting(self, waiting: _Waiting) -> bool:
        return any(self._goes_before(holder, waiting) for holder in self._holders)

    def _goes_before(self, other: _Waiting, waiting: _Waiting) -> bool:
        """Whether another job, which came before, keeps this one waiting."""
        is_stuck = other.is_chosen_for and not self._can_choose
        return other.rank <= waiting.rank and not (is_stuck and not waiting.is_chosen_for)

    def _let_go(self, waiting: _Waiting) -> None:
        self._waiting = _without(waiting, self._waiting)
        self._holders = _without(waiting, self._holders)
        self._call_next()


def _rank(job: RunningJob) -> int:
    return RANKS[job.delivery.request.priority]


async def _passes_by(waiting: _Waiting, passes: Passes) -> bool:
    """Returns when the job has its turn, or may go without one."""
    while True:
        await waiting.is_called.wait()
        waiting.is_called.clear()
        if waiting.has_turn:
            return False
        if await passes():
            return True


def _without(waiting: _Waiting, line: tuple[_Waiting, ...]) -> tuple[_Waiting, ...]:
    return tuple(other for other in line if other is not waiting)


def _queued_at_s(waiting: _Waiting) -> float:
    return waiting.job.delivery.queued_at_s
