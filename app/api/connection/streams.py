"""Limits how many answers are open at a time, streamed or not, in all processes on the port."""

import asyncio
from contextlib import suppress

from starlette.requests import Request

from app.api.connection.bodies import BodySlot, body_of, client_of
from app.errors import TooManyStreamsError
from app.metrics import ApiMetrics
from app.process_table import ProcessRow

RETRY_AFTER_S = 1


class StreamSlots:
    """The first `max_streams` are open to all, so a client alone may take them all. Once they are
    taken there are as many again, for clients that have fewer than are left: one that has taken all
    of the first keeps no other out, and no client ever has more than `max_streams`.

    Args:
        max_streams: of all processes together. Two processes that are asked for the last slot
            at the same instant may both refuse; there are never more.
    """

    def __init__(self, max_streams: int, row: ProcessRow, metrics: ApiMetrics) -> None:
        self._max_streams = max_streams
        self._row = row
        self.taken: set[StreamSlot] = set()
        self._none_taken = asyncio.Event()
        self._none_taken.set()
        self.num_open = 0
        self._metrics = metrics

    def take(self, request: Request, owner: str, *, is_upload: bool = False) -> "StreamSlot":
        """For the answer to a request. While its body is still to come it is not counted: where
        there is no room the request is refused unread; otherwise it counts from its body's end,
        where it may still be refused.

        Args:
            is_upload: the body may hold a video, which is not to be lost: where there is no room
                at its end it keeps the body's slot instead, until `StreamSlot.open`.

        Raises: TooManyStreamsError.
        """
        slot = StreamSlot(self, client_of(request.scope, owner), body_of(request.scope))
        self.taken.add(slot)
        self._none_taken.clear()
        try:
            if slot.body is None:
                self.open(slot)
            else:
                self._check_room(slot.client)
                slot.body.when_read(slot.open_if_room if is_upload else slot.open)
        except TooManyStreamsError:
            self.give_back(slot)
            raise
        return slot

    def open(self, slot: "StreamSlot") -> None:
        """Counts the answer, unless it is open or given back. Raises: TooManyStreamsError."""
        if slot.is_open or slot not in self.taken:
            return
        self._count(slot.client, 1)  # first, so that other processes see it
        try:
            self._check_room(slot.client, counted=1)
        except TooManyStreamsError:
            self._count(slot.client, -1)
            raise
        slot.is_open = True

    def give_back(self, slot: "StreamSlot") -> None:
        """May be called more than once."""
        if slot not in self.taken:
            return
        self.taken.remove(slot)
        if slot.is_open:
            self._count(slot.client, -1)
        if not self.taken:
            self._none_taken.set()

    async def wait_until_none(self) -> None:
        """Waits until no answer is open, and no request for one is arriving."""
        await self._none_taken.wait()

    def _check_room(self, client: str, *, counted: int = 0) -> None:
        """Args: counted: 1: the client's new one is among those that are open."""
        num_open = self._row.table.num_streams() - counted
        if num_open < self._max_streams:
            return
        num_held = self._row.table.num_streams(client) - counted
        if num_held >= 2 * self._max_streams - num_open:
            message = (
                "this client has its share of the answers that may be open at a time "
                "(DYCOKE_MAX_STREAMS): let one end, or try again later"
            )
            raise TooManyStreamsError(message, retry_after_s=RETRY_AFTER_S)

    def _count(self, client: str, change: int) -> None:
        self.num_open += change
        self._row.add_stream(client, change)
        self._metrics.set_open_streams(self.num_open)


class StreamSlot:
    """The slot of one answer: taken at the headers, open once the body has arrived."""

    def __init__(self, slots: StreamSlots, client: str, body: BodySlot | None) -> None:
        self.client = client
        self.body = body
        self.is_open = False
        self._slots = slots

    def open(self) -> bool:
        """Gives up the body's slot, too. Returns True. Raises: TooManyStreamsError."""
        self._slots.open(self)
        if self.body is not None:
            self.body.release()
        return True

    def open_if_room(self) -> bool:
        with suppress(TooManyStreamsError):
            return self.open()
        return False

    def release(self) -> None:
        """May be called more than once."""
        self._slots.give_back(self)
