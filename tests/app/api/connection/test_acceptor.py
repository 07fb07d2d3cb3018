"""Connections on a shared port: each process gets its part, and none waits for one that is stuck.

Processes are played by acceptors in one event loop, on sockets of one port.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from app.api.connection.acceptor import Acceptor
from app.process_table import ProcessTable

PATIENCE_S = 20.0


class Process:
    """Counts its connections."""

    def __init__(self, listener: socket.socket, table: ProcessTable, slot: int) -> None:
        self.listener = listener.dup()
        self.listener.setblocking(False)
        self.transports: list[asyncio.BaseTransport] = []
        self.row = table.take_row(slot)
        self.acceptor = Acceptor(self.listener, self._protocol, self.row, self._num_open)
        self.acceptor.look()

    def _num_open(self) -> int:
        return len(self.transports)

    def _protocol(self) -> asyncio.Protocol:
        process = self

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                process.transports.append(transport)

        return Protocol()

    def end(self) -> None:
        self.acceptor.close()
        self.listener.close()
        for transport in self.transports:
            transport.abort()  # type: ignore[attr-defined]


class Port:
    def __init__(self, table: ProcessTable) -> None:
        self.table = table
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.processes: list[Process] = []
        self._clients: list[socket.socket] = []

    def start(self, slot: int) -> Process:
        process = Process(self.listener, self.table, slot)
        self.processes.append(process)
        return process

    def connect(self) -> None:
        self._clients.append(socket.create_connection(self.listener.getsockname()))

    async def connect_and_wait(self) -> None:
        count = self.num_accepted
        self.connect()
        await until(lambda: self.num_accepted > count)

    @property
    def num_accepted(self) -> int:
        return sum(len(process.transports) for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.end()
        for each in (self.listener, *self._clients):
            each.close()


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():
            await asyncio.sleep(0.001)


@pytest.fixture
async def port(process_table: ProcessTable) -> AsyncIterator[Port]:
    port = Port(process_table)
    yield port
    port.close()
    await asyncio.sleep(0.01)  # transports close in the loop's next turn


def shares(*processes: Process) -> list[int]:
    return sorted(len(process.transports) for process in processes)


async def test_connections_are_shared_evenly(port: Port) -> None:
    first, second = port.start(0), port.start(1)
    for _ in range(10):
        for process in (first, second):
            process.acceptor.look()
        await port.connect_and_wait()
    assert shares(first, second) == [5, 5]


async def test_burst_is_shared(port: Port) -> None:
    first, second = port.start(0), port.start(1)
    for _ in range(20):
        port.connect()
    await until(lambda: port.num_accepted == 20)
    assert shares(first, second)[0] >= 5


async def test_busier_process_takes_what_the_other_leaves(port: Port) -> None:
    only = port.start(0)
    for _ in range(3):
        await port.connect_and_wait()
    stuck = port.table.take_row(1)
    stuck.beat()  # it lives, has fewer connections, and does not accept
    await port.connect_and_wait()
    assert len(only.transports) == 4


async def test_draining_process_leaves_all_to_the_others_while_there_are_any(port: Port) -> None:
    draining, other = port.start(0), port.start(1)
    draining.row.begin_drain()
    draining.acceptor.begin_drain()
    for _ in range(4):
        await port.connect_and_wait()
        draining.acceptor.look()
    assert len(draining.transports) == 0
    other.acceptor.close()
    other.row.leave()
    draining.acceptor.look()
    await port.connect_and_wait()
    assert len(draining.transports) == 1


async def test_without_descriptors_it_waits_and_then_goes_on(
    port: Port, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("app.api.connection.acceptor.EXHAUSTED_S", 0.05)
    process = port.start(0)
    failures = [OSError(24, "too many open files")]
    accept = process.listener.accept

    class Reluctant:
        def accept(self) -> object:
            if failures:
                raise failures.pop()
            return accept()

        def fileno(self) -> int:
            return process.listener.fileno()

    monkeypatch.setattr(process.acceptor, "_listener", Reluctant())
    await port.connect_and_wait()
    assert "cannot accept a connection" in caplog.messages
