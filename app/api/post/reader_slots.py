"""Limits how many frame readers run at a time, in all API processes of a machine together.

Slots are locks in the processes' table (`app.process_table`), so those of a process that died are
free at once. Waits: for a slot, until another reader ends, which the readers' own time limits
ensure. Waiters look again every `POLL_S`, because other processes' locks send no notification.

In each process one waiter at a time looks for a slot; owners take turns: see `FairBudget`. The
process whose waiter has looked longest is next, and the others leave the slot to it as long as it
is alive. So before each of its turns a process waits for one reader of every other process, not for
their queues.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress

from app.api.post.fair_budget import FairBudget
from app.process_table import Lock, ProcessRow, Wait

POLL_S = 0.02

_LOOKING = 0  # the number of the lock to hold while looking for slots
_ALONE = 2**40  # locks from here on, by the owner's digest: an owner's right to be alone


class ReaderSlots:
    """Args:
    row: this process's own.
    num_slots: for probes, and as many for reads.
    """

    def __init__(self, row: ProcessRow, num_slots: int) -> None:
        self._row = row
        self._table = row.table
        self._probes = _Slots(range(1, 1 + num_slots), Wait.TO_PROBE)
        self._reads = _Slots(range(1 + num_slots, 1 + 2 * num_slots), Wait.TO_READ)
        self._looking = asyncio.Lock()  # this process's waiters: first come, first served

    @asynccontextmanager
    async def to_probe(self, owner: str) -> AsyncIterator[None]:
        async with self._one_of(self._probes, owner):
            yield

    @asynccontextmanager
    async def to_read(self, owner: str) -> AsyncIterator[None]:
        async with self._one_of(self._reads, owner):
            yield

    @asynccontextmanager
    async def alone(self, owner: str) -> AsyncIterator[bool]:
        """Holds every slot, once their holders are done; no one else gets one meanwhile.

        Yields False, and holds nothing, where the same owner is alone, is about to be, or was until
        just now: it must leave the others as much time as it took.
        """
        turn = self._table.try_lock(_number_of(owner))
        if turn is None:
            yield False
            return
        now = asyncio.get_running_loop().time
        took_s = 0.0
        try:
            with ExitStack() as held:
                async with self._looking:
                    held.callback((await self._lock(_LOOKING)).release)
                    began_at = now()
                    try:
                        for number in (*self._probes.numbers, *self._reads.numbers):
                            held.callback((await self._lock(number)).release)
                        yield True
                    finally:
                        took_s = now() - began_at
        finally:
            asyncio.get_running_loop().call_later(took_s, turn.release)

    @asynccontextmanager
    async def _one_of(self, slots: "_Slots", owner: str) -> AsyncIterator[None]:
        async with slots.turn.taken(1, owner):
            slot = await self._take(slots)
        try:
            yield
        finally:
            slot.release()
            slots.freed.set()

    async def _take(self, slots: "_Slots") -> Lock:
        self._row.begin_wait(slots.wait)
        try:
            while (slot := await self._look(slots)) is None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await slots.freed.wait()
            return slot
        finally:
            self._row.end_wait(slots.wait)

    async def _look(self, slots: "_Slots") -> Lock | None:
        slots.freed.clear()
        async with self._looking:
            looking = await self._lock(_LOOKING)
            try:
                return self._try(slots.numbers) if self._row.is_next(slots.wait) else None
            finally:
                looking.release()

    async def _lock(self, number: int) -> Lock:
        while (lock := self._table.try_lock(number)) is None:
            await asyncio.sleep(POLL_S)
        return lock

    def _try(self, numbers: Sequence[int]) -> Lock | None:
        return next(filter(None, map(self._table.try_lock, numbers)), None)


class _Slots:
    """One kind of slots: the numbers of their locks, and this process's waiters."""

    def __init__(self, numbers: Sequence[int], wait: Wait) -> None:
        self.numbers = numbers
        self.wait = wait
        self.turn = FairBudget(1)
        self.freed = asyncio.Event()  # held by this process


def _number_of(owner: str) -> int:
    digest = hashlib.sha256(owner.encode()).digest()
    return _ALONE + int.from_bytes(digest[:4], "big")
