"""Opens connections to the hosts of URLs, at exactly the addresses that were checked.

A name is resolved once, where the connection is made, and all its addresses must be on the public
internet. The fetcher decides which names may be dialled.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from ipaddress import ip_address, ip_network
from weakref import WeakValueDictionary

import httpcore

MAX_LOOKUPS = 32  # at a time; others wait
MAX_LOOKUPS_OF_A_KEY = 4  # of those

# Not public by newer registries, or leading to other addresses, which are not checked: protocol
# assignments (a cloud keeps its metadata there), 6to4 and its relays, Teredo.
_NOT_PUBLIC = tuple(map(ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16")))
_PUBLIC_IPV6 = ip_network("2000::/3")  # neither NAT64 nor mapped addresses are in it

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
Dial = Callable[[str, int, float | None], Awaitable[httpcore.AsyncNetworkStream]]


def is_global(text: str) -> bool:
    """Whether an address lies in the public internet, and leads nowhere else."""
    address = ip_address(text.partition("%")[0])
    if any(address in network for network in _NOT_PUBLIC):
        return False
    if address.version == 6 and address not in _PUBLIC_IPV6:
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


class Resolver:
    """Asks the system, in its own threads: a client chooses the name, whose server may leave a
    query unanswered for half a minute, and a thread cannot be stopped. Uploads share the loop's own
    threads, and a key has few of these.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_LOOKUPS, thread_name_prefix="resolver")
        # Of keys with a lookup under way or waiting; that holds on to its key's.
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    def of(self, owner: str) -> Resolve:
        """Resolves names for one key, in its turn. Raises: OSError, UnicodeError."""
        return partial(self._resolve, owner)

    async def _resolve(self, owner: str, host: str, port: int) -> Sequence[str]:
        turns = self._turns.setdefault(owner, asyncio.Semaphore(MAX_LOOKUPS_OF_A_KEY))
        await turns.acquire()
        loop = asyncio.get_running_loop()

        def give_back(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(turns.release)

        lookup = self._threads.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        # With the thread: one that is no longer waited for keeps both.
        lookup.add_done_callback(give_back)
        found = await asyncio.wrap_future(lookup)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Resolves, checks and dials. httpcore speaks TLS over what it returns, under the name."""

    def __init__(self, resolve: Resolve, dial: Dial) -> None:
        self._resolve = resolve
        self._dial = dial

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._resolve(host.strip("[]"), port)
        if not addresses or not all(map(is_global, addresses)):
            raise _NotAllowedError("not a public address")
        for address in addresses[:-1]:
            try:
                return await self._dial(address, port, timeout)
            except (httpcore.ConnectError, httpcore.ConnectTimeout, OSError):
                continue
        return await self._dial(addresses[-1], port, timeout)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _NotAllowedError(httpcore.ConnectError):
    """An address that may not be dialled."""


async def dial_address(
    address: str, port: int, timeout: float | None
) -> httpcore.AsyncNetworkStream:
    return await httpcore.AnyIOBackend().connect_tcp(address, port, timeout)
