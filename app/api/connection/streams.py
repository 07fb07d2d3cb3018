"""How many answers are open at a time, streamed or not: here, and in all processes on the port."""

import asyncio

from app.errors import TooManyStreamsError
from app.metrics import ApiMetrics
from app.process_table import ProcessRow


class StreamSlots:
    """Args:
    max_streams: of all processes together. Two that are asked for the last slot at the same
        instant may both refuse; never are there more.
    """

    def __init__(self, max_streams: int, row: ProcessRow, metrics: ApiMetrics) -> None:
        self._max_streams = max_streams
        self._row = row
        self._num_open = 0
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._metrics = metrics

    def take(self) -> "StreamSlot":
        """Raises TooManyStreamsError."""
        self._count(1)  # first, so that the others see it
        if self._row.table.num_streams() > self._max_streams:
            self._count(-1)
            raise TooManyStreamsError("this server has too many open answers")
        return StreamSlot(self)

    async def wait_until_none(self) -> None:
        await self._none_open.wait()

    def _count(self, change: int) -> None:
        self._num_open += change
        self._row.set_streams(self._num_open)
        self._metrics.set_open_streams(self._num_open)
        if self._num_open:
            self._none_open.clear()
        else:
            self._none_open.set()


class StreamSlot:
    """One open answer. `release` may be called more than once."""

    def __init__(self, slots: StreamSlots) -> None:
        self._slots: StreamSlots | None = slots

    def release(self) -> None:
        if self._slots is not None:
            self._slots._count(-1)
            self._slots = None
