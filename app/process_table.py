"""Numbers and locks that the API processes of one machine share, in shared memory.

The table has one row per process, numbered 0 to `num_processes` - 1. A process that is started in
place of a dead one takes over its row. Only the row's own process writes to it (after its death,
the supervisor), so numbers need no lock, and no process waits for one that is stuck. Numbers of
different rows are not read at the same instant.

Streams, bodies and incoming bytes are also counted per client, in one count-min sketch per row
(Cormode, Muthukrishnan: Journal of Algorithms 55(1), 2005): the client's digest selects two
counters, and the smaller one is the count. It is too large only if other clients share both
counters. The digest is keyed, so no client can choose a name for which they do.

The memory is an anonymous file, and processes inherit it and the locks by descriptor: both are gone
with the last process, however it ends. This module does not know what the locks are for. Linux
only.
"""

import fcntl
import hashlib
import mmap
import os
import secrets
import struct
import time
from collections.abc import Iterable
from enum import IntEnum
from functools import lru_cache

HEARTBEAT_TIMEOUT_S = 2.0  # after this a process counts as stuck

_HEADER = struct.Struct("=qq16s")  # version, rows, token
_VERSION = 4
_WORD_BYTES = 8
_ROW_WORDS = 16  # two cache lines
_HEADER_BYTES = _ROW_WORDS * _WORD_BYTES
_SKETCH_WIDTH = 4096  # counters
_SKETCH_DEPTH = 2  # counters per client
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid


class _Word(IntEnum):
    """Of a row."""

    HEARTBEAT_NS = 0  # time.monotonic_ns, the same clock in all processes; 0: there is none
    CONNECTIONS = 1
    STREAMS = 2
    IS_DRAINING = 3
    STORED_BYTES = 4  # outlives the process
    DEATHS = 5  # likewise
    STORED_VIDEOS = 6  # likewise
    INCOMING_BYTES = 7
    WAITS_TO_PROBE_NS = 8  # since when it waits, by the heartbeat's clock; 0: it does not
    WAITS_TO_READ_NS = 9
    BODIES = 10


class Wait(IntEnum):
    """The things that processes wait for in turn."""

    TO_PROBE = _Word.WAITS_TO_PROBE_NS
    TO_READ = _Word.WAITS_TO_READ_NS


_BY_CLIENT = (_Word.STREAMS, _Word.INCOMING_BYTES, _Word.BODIES)  # counted per client, too
_SKETCH_WORDS = _SKETCH_WIDTH * _SKETCH_DEPTH
_CLIENT_WORDS = _SKETCH_WORDS * len(_BY_CLIENT)  # of a row

_OF_THE_LIVING = (
    *(_Word.HEARTBEAT_NS, _Word.CONNECTIONS, _Word.STREAMS, _Word.IS_DRAINING),
    *(_Word.INCOMING_BYTES, _Word.BODIES, _Word.WAITS_TO_PROBE_NS, _Word.WAITS_TO_READ_NS),
)


class ProcessTable:
    """Args:
    fd: of a table that `create` has made; it must stay open as long as the table is used.
    """

    num_processes: int

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, 0)
        version, self.num_processes, token = _HEADER.unpack_from(self._memory)
        assert version == _VERSION
        self.token: str = token.hex()
        self._words = memoryview(self._memory).cast("q")
        self._digest_key = token

    @classmethod
    def create(cls, num_processes: int) -> "ProcessTable":
        """Makes a table for this many processes, all of which are yet to start."""
        fd = os.memfd_create("api-processes", os.MFD_CLOEXEC)
        by_client_bytes = _CLIENT_WORDS * _WORD_BYTES * num_processes
        os.ftruncate(fd, _HEADER_BYTES * (1 + num_processes) + by_client_bytes)
        os.pwrite(fd, _HEADER.pack(_VERSION, num_processes, secrets.token_bytes(16)), 0)
        return cls(fd)

    def close(self) -> None:
        """Closes the descriptor, and with it all locks. For the process that created the table."""
        os.close(self.fd)

    def take_row(self, number: int) -> "ProcessRow":
        """Returns the calling process's row, cleared of what an earlier process left there."""
        self._clear(number)
        return ProcessRow(self, number)

    def note_death(self, number: int) -> None:
        """Notes that a process is gone, with everything that it had open. For its supervisor."""
        self._set(number, _Word.DEATHS, self.deaths(number) + 1)
        self._clear(number)

    def is_alive(self, number: int) -> bool:
        """Whether a process runs and its event loop has turned recently."""
        beat_ns = self._get(number, _Word.HEARTBEAT_NS)
        return time.monotonic_ns() - beat_ns < HEARTBEAT_TIMEOUT_S * 1e9 if beat_ns else False

    def deaths(self, number: int) -> int:
        """How often processes with this number have ended unexpectedly."""
        return self._get(number, _Word.DEATHS)

    def num_streams(self, client: str | None = None) -> int:
        """Open streams in all processes, or those of one client."""
        return self._sum(_Word.STREAMS, client)

    def num_bodies(self, client: str | None = None) -> int:
        """Requests whose bodies are coming in, in all processes; those that count for one client,
        where one is named.
        """
        return self._sum(_Word.BODIES, client)

    def stored_bytes(self) -> int:
        """What all processes, dead ones included, have stored less what they have removed."""
        return self._sum(_Word.STORED_BYTES)

    def stored_videos(self) -> int:
        """How many videos all processes have stored, less those that they have removed."""
        return self._sum(_Word.STORED_VIDEOS)

    def incoming_bytes(self, client: str | None = None) -> int:
        """Of uploads under way, in all processes that are alive; of one client's, where one is
        named.
        """
        return self._sum(_Word.INCOMING_BYTES, client)

    def has_other_open(self, number: int) -> bool:
        """Whether another process is alive and accepts requests."""
        others = (other for other in range(self.num_processes) if other != number)
        return any(self.is_alive(o) and not self._get(o, _Word.IS_DRAINING) for o in others)

    def fewest_connections(self) -> int | None:
        """The smallest number of connections of a living process; None if there is none."""
        numbers = filter(self.is_alive, range(self.num_processes))
        return min((self._get(number, _Word.CONNECTIONS) for number in numbers), default=None)

    def try_lock(self, number: int) -> "Lock | None":
        """Takes one of any number of locks; None if somebody has it, in this process or another.

        A lock goes with its process.
        """
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR)  # each row has its own locks
        try:
            request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return Lock(fd)

    def _get(self, number: int, word: _Word) -> int:
        return self._words[(1 + number) * _ROW_WORDS + word]

    def _set(self, number: int, word: _Word, value: int) -> None:
        self._words[(1 + number) * _ROW_WORDS + word] = value

    def _clear(self, number: int) -> None:
        for word in _OF_THE_LIVING:
            self._set(number, word, 0)
        begin = self._sketch(number)
        zeros = memoryview(bytes(_CLIENT_WORDS * _WORD_BYTES)).cast("q")
        self._words[begin : begin + _CLIENT_WORDS] = zeros

    def _sum(self, word: _Word, client: str | None = None) -> int:
        rows = range(self.num_processes)
        if client is None:
            return sum(self._get(row, word) for row in rows)
        counters = self._counters(word, client)
        sums = (sum(self._words[self._sketch(row) + at] for row in rows) for at in counters)
        return min(sums)

    def _add(self, number: int, word: _Word, change: int, *clients: str) -> None:
        self._set(number, word, self._get(number, word) + change)
        for client in clients:
            for at in self._counters(word, client):
                self._words[self._sketch(number) + at] += change

    def _sketch(self, number: int) -> int:
        """The offset of a row's counters per client."""
        return (1 + self.num_processes) * _ROW_WORDS + number * _CLIENT_WORDS

    def _counters(self, word: _Word, client: str) -> list[int]:
        """Where a client's are among those."""
        begin = _BY_CLIENT.index(word) * _SKETCH_WORDS
        return [begin + at for at in _places_in_sketch(client, self._digest_key)]


@lru_cache(maxsize=1024)
def _places_in_sketch(client: str, key: bytes) -> tuple[int, ...]:
    """Where a client's counters are in a sketch, one in each row of it."""
    digest = hashlib.blake2b(client.encode(), key=key, digest_size=8).digest()
    parts = enumerate((digest[:4], digest[4:]))
    return tuple(row * _SKETCH_WIDTH + int.from_bytes(part) % _SKETCH_WIDTH for row, part in parts)


class ProcessRow:
    """What one process publishes about itself. It alone writes; two threads must not set the same
    number.
    """

    def __init__(self, table: ProcessTable, number: int) -> None:
        assert 0 <= number < table.num_processes
        self.table = table
        self.number = number
        self._has_left = False

    def beat(self) -> None:
        """Notes that the event loop turns; to be called well within `HEARTBEAT_TIMEOUT_S`."""
        self.table._set(self.number, _Word.HEARTBEAT_NS, time.monotonic_ns())

    def begin_drain(self) -> None:
        """Notes that the process accepts no more posts."""
        self.table._set(self.number, _Word.IS_DRAINING, 1)

    def leave(self) -> None:
        """Notes that the process ends: what it still has open no longer counts."""
        self._has_left = True
        self.table._clear(self.number)

    def set_connections(self, count: int) -> None:
        self.table._set(self.number, _Word.CONNECTIONS, count)

    def add_stream(self, client: str, change: int) -> None:
        self._add_open(_Word.STREAMS, change, client)

    def add_body(self, clients: Iterable[str], change: int) -> None:
        """Args: clients: all those that it counts for."""
        self._add_open(_Word.BODIES, change, *clients)

    def add_stored(self, num_bytes: int, num_videos: int) -> None:
        self.table._add(self.number, _Word.STORED_BYTES, num_bytes)
        self.table._add(self.number, _Word.STORED_VIDEOS, num_videos)

    def add_incoming_bytes(self, client: str, num_bytes: int) -> None:
        self._add_open(_Word.INCOMING_BYTES, num_bytes, client)

    def begin_wait(self, wait: Wait) -> None:
        """Notes that from now on this process waits for something, after those that already do."""
        if not self._has_left:
            self.table._set(self.number, _Word(wait), time.monotonic_ns())

    def end_wait(self, wait: Wait) -> None:
        self.table._set(self.number, _Word(wait), 0)

    def is_next(self, wait: Wait) -> bool:
        """Whether no other process that is alive has waited longer than this one."""
        since_ns = self.table._get(self.number, _Word(wait))
        for other in range(self.table.num_processes):
            other_ns = self.table._get(other, _Word(wait))
            waits_longer = other_ns > 0 and (other_ns, other) < (since_ns, self.number)
            if waits_longer and self.table.is_alive(other):
                return False
        return True

    def _add_open(self, word: _Word, change: int, *clients: str) -> None:
        if not self._has_left:
            self.table._add(self.number, word, change, *clients)


class Lock:
    """A lock that is held until `release`."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
