"""`/metrics` for a port with several processes: the metrics of each, with the label `process`.

Every process has its own registry and serves its page to the others, on demand, through a Unix
socket of Linux' abstract kind, which leaves no file. The process that is scraped fetches the
others' pages and joins them. So gauges, exemplar-free histograms and the processes' collectors work
as usual. A counter belongs to one process and is reset by its restart, as Prometheus expects. The
label is the process's number, so a restart creates no new series. (The client library's
multiprocess mode instead adds counters up in files, keeps those of dead processes forever, has no
collectors of its own, and labels gauges by process id.)

If a process is dead or does not answer in time, the page has only `dycoke_api_process_up` 0 for it.
"""

import asyncio
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.process_table import ProcessRow, ProcessTable

FETCH_TIMEOUT_S = 1.0
MAX_PAGE_BYTES = 8 * 2**20
REST = 9.0  # after making its own page, in times of what that took
MAX_REST_S = 0.5  # well within the others' patience
LABEL = "process"

_CREDENTIALS = struct.Struct("3i")  # process, user and group at the other end


class MetricsPage:
    def __init__(self, registry: CollectorRegistry, row: ProcessRow) -> None:
        self._registry = registry
        self._row = row
        self._own = _Shared(self._make_own, rest=REST)
        self._merged = _Shared(self._make_merged)

    @asynccontextmanager
    async def shown_to_siblings(self) -> AsyncIterator[None]:
        if self._row.table.num_processes == 1:
            yield
            return
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(_address(self._row.table, self._row.number))
            server = await asyncio.start_unix_server(self._show, sock=listener)
            try:
                yield
            finally:
                server.close()

    async def render(self) -> bytes:
        """The page for Prometheus, of all processes."""
        return await self._merged.get()

    async def _make_own(self) -> bytes:
        return generate_latest(self._registry)

    async def _make_merged(self) -> bytes:
        table = self._row.table
        numbers = range(table.num_processes)
        fetched = await asyncio.gather(*(self._page_of(number) for number in numbers))
        pages = {
            number: page for number, page in zip(numbers, fetched, strict=True) if page is not None
        }
        about = generate_latest(AboutProcesses(table, pages.keys()))
        return merge(pages) + about

    async def _page_of(self, number: int) -> bytes | None:
        if number == self._row.number:
            return await self._own.get()
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                return await _fetch(_address(self._row.table, number))
        except (OSError, TimeoutError, ValueError):  # the first: no process is there
            return None

    async def _show(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            if _is_of_this_user(writer.get_extra_info("socket")):
                writer.write(await self._own.get())
            writer.close()
            await writer.wait_closed()


class _Shared:
    """A page for all who ask before it is begun: who asks later gets a later one.

    Args:
        rest: before the next one is begun, in times of what the last one took.
    """

    def __init__(self, make: Callable[[], Awaitable[bytes]], *, rest: float = 0.0) -> None:
        self._make = make
        self._rest = rest
        self._next: asyncio.Task[bytes] | None = None
        self._turn = asyncio.Lock()
        self._begins_at = 0.0  # on the monotonic clock, at the earliest

    async def get(self) -> bytes:
        if self._next is None:
            self._next = asyncio.create_task(self._make_next())
        return await asyncio.shield(self._next)

    async def _make_next(self) -> bytes:
        async with self._turn:
            await asyncio.sleep(max(0.0, self._begins_at - time.monotonic()))
            self._next = None
            began_at = time.monotonic()
            page = await self._make()
            ended_at = time.monotonic()
            self._begins_at = ended_at + min(self._rest * (ended_at - began_at), MAX_REST_S)
            return page


def merge(pages: Mapping[int, bytes]) -> bytes:
    """One page of several in Prometheus' text format, each sample with its process' number.

    A family's samples are together, under the one description that the format allows it.
    """
    families: dict[bytes, tuple[list[bytes], list[bytes]]] = {}  # name: description, samples
    for number, page in pages.items():
        label = f'{LABEL}="{number}"'.encode()
        described = set[bytes]()
        samples: list[bytes] = []
        for line in page.splitlines(keepends=True):
            if line.startswith(b"# "):
                name = line.split(b" ", 3)[2]
                is_new = name not in families or name in described
                description, samples = families.setdefault(name, ([], []))
                if is_new:
                    described.add(name)
                    description.append(line)
            else:
                samples.append(_labelled(line, label))
    parts = (line for family in families.values() for lines in family for line in lines)
    return b"".join(parts)


def _labelled(sample: bytes, label: bytes) -> bytes:
    """`name{a="1"} 2` or `name 2` with one label more, which comes first."""
    name, brace, rest = sample.partition(b"{")
    if brace:  # the first one opens the labels; others are in values
        return b"%b{%b,%b" % (name, label, rest)
    name, _, value = sample.partition(b" ")
    return b"%b{%b} %b" % (name, label, value)


class AboutProcesses(Collector):
    """What is known of the processes apart from their own pages."""

    def __init__(self, table: ProcessTable, answering: Iterable[int]) -> None:
        self._table = table
        self._answering = frozenset(answering)

    def collect(self) -> Sequence[Metric]:
        is_up = GaugeMetricFamily(
            "dycoke_api_process_up",
            "1 where an API process answered this scrape, else 0.",
            labels=[LABEL],
        )
        deaths = CounterMetricFamily(
            "dycoke_api_process_deaths",
            "API processes that ended unexpectedly; each is restarted.",
            labels=[LABEL],
        )
        for number in range(self._table.num_processes):
            is_up.add_metric([str(number)], number in self._answering)
            deaths.add_metric([str(number)], self._table.deaths(number))
        return [is_up, deaths]


def _address(table: ProcessTable, number: int) -> str:
    return f"\0dycoke-{table.token}-{number}"


async def _fetch(address: str) -> bytes:
    """Raises ValueError: another user's, or far too large. OSError: no process is there."""
    reader, writer = await asyncio.open_unix_connection(sock=_connect(address))
    try:
        page = bytearray()
        while chunk := await reader.read(2**16):
            page += chunk
            if len(page) > MAX_PAGE_BYTES:
                raise ValueError("too large")
        return bytes(page)
    finally:
        writer.close()


def _connect(address: str) -> socket.socket:
    """Connects at once or not at all; an event loop's own way may not know abstract addresses."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)
        connection.connect(address)
        if not _is_of_this_user(connection):
            raise ValueError("a socket of another user")
    except BaseException:
        connection.close()
        raise
    return connection


def _is_of_this_user(connection: socket.socket) -> bool:
    """Whether this user runs the process at the other end: anybody can find an abstract address."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(credentials)[1] == os.geteuid())
