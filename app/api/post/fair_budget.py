"""Shares out a bounded amount of something in this process, and queues those that wait for some.

Owners are served in turn, however many requests of each wait; requests of one owner are first come,
first served. So an owner that has just arrived waits for what is in use, not for another's queue.

Waits: until those that have some give it back, which their own time limits ensure.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_Entry = tuple[int, asyncio.Future[None]]


class FairBudget:
    """A waiter that wants more than the whole budget is admitted when nothing is in use.

    Args:
        max_units: of whatever is shared: slots, bytes.
        max_of_one: the most that one owner may have at a time; None: all of it.
    """

    def __init__(self, max_units: int, *, max_of_one: int | None = None) -> None:
        self._max_units = max_units
        self._max_of_one = max_units if max_of_one is None else max_of_one
        self._held: Counter[str] = Counter()  # by owner
        self._waiting: dict[str, deque[_Entry]] = {}  # by owner, in turn

    @property
    def used(self) -> int:
        return self._held.total()

    async def take(self, num_units: int, owner: str) -> None:
        """Waits until there is room; a waiter that is cancelled meanwhile holds nothing."""
        entry = (num_units, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(owner, deque()).append(entry)
        self._admit()
        try:
            await entry[1]
        except asyncio.CancelledError:
            if entry[1].cancelled():
                self._drop(owner, entry)
                self._admit()
            else:  # it was admitted at that moment
                self.give_back(num_units, owner)
            raise

    def give_back(self, num_units: int, owner: str) -> None:
        self._held[owner] -= num_units
        if not self._held[owner]:
            del self._held[owner]
        self._put_last(owner)  # it has had its turn, whatever arrived meanwhile
        self._admit()

    @asynccontextmanager
    async def taken(self, num_units: int, owner: str) -> AsyncIterator[None]:
        await self.take(num_units, owner)
        try:
            yield
        finally:
            self.give_back(num_units, owner)

    def _admit(self) -> None:
        while (owner := self._next_owner()) is not None:
            num_units, admitted = entry = self._waiting[owner][0]
            if admitted.done():  # cancelled, and not yet aware of it
                self._drop(owner, entry)
                continue
            if self.used and self.used + num_units > self._max_units:
                return
            self._drop(owner, entry)
            self._put_last(owner)
            self._held[owner] += num_units
            admitted.set_result(None)

    def _put_last(self, owner: str) -> None:
        if owner in self._waiting:
            self._waiting[owner] = self._waiting.pop(owner)

    def _next_owner(self) -> str | None:
        """The first waiting owner that may have more."""
        return next((owner for owner in self._waiting if self._may_have_more(owner)), None)

    def _may_have_more(self, owner: str) -> bool:
        num_units, _ = self._waiting[owner][0]
        held = self._held[owner]
        return not held or held + num_units <= self._max_of_one

    def _drop(self, owner: str, entry: _Entry) -> None:
        entries = self._waiting.get(owner, deque())
        if entry in entries:  # else `_admit` has passed it over
            entries.remove(entry)
            if not entries:
                del self._waiting[owner]
