"""How many bytes of frames one API process holds between their reader and Redis.

Waits: for those who came before, until their frames are stored or given up, which the readers' time
limits and the patience with Redis see to.
"""

import asyncio
from collections import deque
from contextlib import suppress


class FramesInHand:
    """Who does not fit waits, first come, first served. Frames that alone are more than the budget
    are admitted when there are no others.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._used_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    async def take(self, num_bytes: int) -> None:
        """Waits until there is room; whoever is cancelled meanwhile holds nothing."""
        admitted = asyncio.get_running_loop().create_future()
        entry = (num_bytes, admitted)
        self._waiting.append(entry)
        self._admit()
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted.cancelled():
                with suppress(ValueError):  # `_admit` has passed it over
                    self._waiting.remove(entry)
                self._admit()
            else:  # it was admitted just then
                self.give_back(num_bytes)
            raise

    def give_back(self, num_bytes: int) -> None:
        self._used_bytes -= num_bytes
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            num_bytes, admitted = self._waiting[0]
            if admitted.done():  # cancelled, and not yet told so
                self._waiting.popleft()
                continue
            if self._used_bytes and self._used_bytes + num_bytes > self._max_bytes:
                return
            self._waiting.popleft()
            self._used_bytes += num_bytes
            admitted.set_result(None)
