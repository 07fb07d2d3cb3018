"""ASGI middleware: limits how many requests may be sending bodies, and how slowly.

A request takes a slot at its headers, by key and by the client's address, and gives it back with
the last byte of its body. So a client that sends nothing holds nothing else, and not for long. If
there is no room for the answer to an upload, the upload keeps the slot until it is stored: see
`StreamSlots`. The first byte must come within `FIRST_BYTE_S`. After that a body has to keep up, at
all times, with a rate that rises with the share of slots that are taken, so that slow clients make
room when others need it.

This module knows bodies under way, not what happens to them afterwards. Slots are counted over all
API processes of the port. What changes in another process affects the minimum rate here only when a
body begins or ends here, or with the next part of a body.
"""

import asyncio
import ipaddress
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.connection.pace import Pace
from app.api.errors import response_for
from app.errors import TooManyUploadsError, UploadTimeoutError
from app.keys.entries import ANONYMOUS
from app.process_table import ProcessRow

FIRST_BYTE_S = 5.0
IDLE_S = 30.0  # how far a body may fall behind its rate; FIRST_BYTE_S if no slot is free
MIN_BYTES_S = 8192.0  # while nearly all slots are free
BUSY_MIN_BYTES_S = 262_144.0  # when none is
METHODS = frozenset({"POST", "PUT", "PATCH"})
BODY = "dycoke.body"  # key of a scope: its slot


class BodySlots:
    """
    Args:
        row: of this process, among those on the port.
        max_bodies: of all processes together, and so `max_per_client`: of one key, and of one
            address (an IPv6 network of 64 bits). Two processes that are asked for the last slot at
            the same instant may both refuse; there are never more.
    """

    def __init__(self, row: ProcessRow, *, max_bodies: int, max_per_client: int) -> None:
        self._row = row
        self._max_bodies = max_bodies
        self._max_per_client = max_per_client
        self._open: set[BodySlot] = set()

    @property
    def load(self) -> float:
        """The share of slots that are taken."""
        return min(1.0, self._row.table.num_bodies() / self._max_bodies)

    def take(self, *clients: str) -> "BodySlot":
        """Raises: TooManyUploadsError."""
        table = self._row.table
        self._row.add_body(clients, 1)  # first, so that other processes see it
        is_over_share = any(table.num_bodies(client) > self._max_per_client for client in clients)
        if is_over_share or table.num_bodies() > self._max_bodies:
            self._row.add_body(clients, -1)
            raise TooManyUploadsError(self._too_many(is_over_share=is_over_share))
        slot = BodySlot(self, clients)
        self._open.add(slot)
        self._on_change()
        return slot

    def give_back(self, slot: "BodySlot") -> None:
        """May be called more than once."""
        if slot in self._open:
            self._open.remove(slot)
            self._row.add_body(slot.clients, -1)
            self._on_change()

    def _too_many(self, *, is_over_share: bool) -> str:
        if is_over_share:
            return (
                f"this client is sending {self._max_per_client} requests already, which is as many "
                "as one may at a time (DYCOKE_MAX_UPLOADS_PER_CLIENT): let one end first"
            )
        return (
            f"{self._max_bodies} requests are being sent already, which is as many as this server "
            "takes at a time (DYCOKE_MAX_UPLOADS): try again later"
        )

    def _on_change(self) -> None:
        load = self.load
        for slot in self._open:
            slot.reschedule(load)


class BodySlot:
    """One body in progress."""

    def __init__(self, slots: BodySlots, clients: tuple[str, ...]) -> None:
        self.clients = clients
        self._slots = slots
        self._now = asyncio.get_running_loop().time
        self._pace = Pace()
        self._waits_since = 0.0  # the reader of the body
        self._has_begun = False  # to come
        self._limit: asyncio.Timeout | None = None
        self._is_read = False
        self._on_read: Callable[[], bool] | None = None

    def when_read(self, callback: Callable[[], bool]) -> None:
        """Calls back once the body is there; what that raises goes to the reader of its end.

        Args:
            callback: returns whether the slot is free now; else it is up to `release`, or the
                request's end.
        """
        if self._is_read:
            callback()
        self._on_read = callback

    def finish(self) -> None:
        """Notes that the body has arrived. Raises what the callback raises."""
        self._is_read = True
        is_free = True
        try:
            if self._on_read is not None:
                is_free = self._on_read()
        finally:
            if is_free:
                self.release()

    def release(self) -> None:
        self._slots.give_back(self)

    async def next(self, receive: Receive) -> Message:
        """The next part of the body.

        Raises:
            UploadTimeoutError: it does not arrive, or arrives too slowly.
        """
        self._waits_since = self._now()
        try:
            async with asyncio.timeout_at(self._deadline(self._slots.load)) as limit:
                self._limit = limit
                message = await receive()
        except TimeoutError:
            if not limit.expired():
                raise
            raise UploadTimeoutError(
                "the body stopped arriving, or arrived too slowly: send at least "
                f"{self._min_bytes_s():.0f} bytes a second"
            ) from None
        finally:
            self._limit = None
            self._pace.wait(self._now() - self._waits_since)
        body = message.get("body", b"")
        self._has_begun = self._has_begun or bool(body)
        self._pace.take(len(body), self._min_bytes_s())
        return message

    def reschedule(self, load: float) -> None:
        """Adapts to the current load, unless the time is already up."""
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(self._deadline(load))

    def _deadline(self, load: float) -> float:
        patience_s = IDLE_S + (FIRST_BYTE_S - IDLE_S) * load if self._has_begun else FIRST_BYTE_S
        return self._waits_since + patience_s - self._pace.behind_s

    def _min_bytes_s(self) -> float:
        return float(MIN_BYTES_S * (BUSY_MIN_BYTES_S / MIN_BYTES_S) ** self._slots.load)


class BodyGuard:
    """Args:
    owner_of: whose key an Authorization header carries; None where the request will be refused.
    count_rejection: called with the code of every post that is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        slots: BodySlots,
        owner_of: Callable[[str | None], str | None],
        count_rejection: Callable[[str], None],
    ) -> None:
        self._app = app
        self._slots = slots
        self._owner_of = owner_of
        self._count_rejection = count_rejection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in METHODS:
            await self._app(scope, receive, send)
            return
        owner = self._owner_of(Headers(scope=scope).get("authorization"))
        if owner is None:  # it will be refused unread
            await self._app(scope, receive, send)
            return
        try:
            slot = self._slots.take(*clients_of(scope, owner))
        except TooManyUploadsError as error:
            self._count_rejection(error.code)
            await response_for(error)(scope, receive, send)
            return
        is_read = False

        async def paced_receive() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            message = await slot.next(receive)
            if message["type"] == "http.disconnect":
                is_read = True
                slot.release()
            elif not message.get("more_body", False):
                is_read = True
                slot.finish()
            return message

        scope[BODY] = slot
        try:
            await self._app(scope, paced_receive, send)
        finally:
            slot.release()


def body_of(scope: Scope) -> BodySlot | None:
    """The slot of a request with a body; None: it has no body."""
    body: BodySlot | None = scope.get(BODY)
    return body


def client_of(scope: Scope, owner: str) -> str:
    """Whose share of the service a request takes: its key's, or where there are none its
    address's.
    """
    return next(iter(clients_of(scope, owner)), ANONYMOUS)


def clients_of(scope: Scope, owner: str) -> list[str]:
    clients = [] if owner == ANONYMOUS else [f"key {owner}"]
    if scope.get("client"):
        clients.append(f"address {_network(scope['client'][0])}")
    return clients


def _network(host: str) -> str:
    """An address, or for IPv6 the network of one customer."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return host
