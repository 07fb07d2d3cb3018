"""Shuts down without breaking requests in progress.

`begin`: nothing new is accepted, open answers continue. `expire`: open answers end now, without
cancelling any job; clients resume elsewhere with Last-Event-ID.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.errors import ShuttingDownError


class Drain:
    def __init__(self) -> None:
        self.is_draining = False
        self._has_expired = False
        self._limits: list[asyncio.Timeout] = []

    def begin(self) -> None:
        self.is_draining = True

    def expire(self) -> None:
        if self._has_expired:
            return
        self.is_draining = self._has_expired = True
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            limit.reschedule(now)

    def check(self) -> None:
        """Raises ShuttingDownError once draining has begun."""
        if self.is_draining:
            raise ShuttingDownError

    @asynccontextmanager
    async def until_expired(self) -> AsyncIterator[None]:
        """Raises ShuttingDownError in the block as soon as the drain's time is over."""
        limit = asyncio.timeout(0 if self._has_expired else None)
        try:
            async with limit:
                self._limits.append(limit)
                try:
                    yield
                finally:
                    self._limits.remove(limit)
        except TimeoutError:
            if limit.expired():
                raise ShuttingDownError from None
            raise
