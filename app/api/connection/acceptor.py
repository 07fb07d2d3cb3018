"""Accepts connections on a port that several processes share, so that each gets its part.

A new connection wakes all processes. The process with the fewest connections accepts it at once;
the others wait a moment, in case that one is busy, stuck or gone, and then accept it themselves. A
draining process leaves connections to the others, unless there are none.
"""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

from app.process_table import ProcessRow

YIELD_S = 0.002
EXHAUSTED_S = 1.0  # out of descriptors or memory: wait until the next attempt

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

logger = logging.getLogger(__name__)


class Acceptor:
    """Args:
    listener: listening, not blocking; closing it stays the caller's.
    num_open: how many connections this process has.
    """

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        row: ProcessRow,
        num_open: Callable[[], int],
    ) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self._row = row
        self._num_open = num_open
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._is_listening = False
        self._is_draining = False
        self._is_closed = False

    def begin_drain(self) -> None:
        self._is_draining = True
        self.look()

    def look(self) -> None:
        """Says that this process lives and how busy it is, and sees whether to listen; to be
        called all the time.
        """
        self._row.beat()
        self._row.set_connections(self._num_connections())
        if self._is_closed or self._pause is not None:
            return
        if self._is_draining and self._row.table.has_other_open(self._row.number):
            self._stop_listening()
        else:
            self._listen()

    def close(self) -> None:
        self._is_closed = True
        self._stop_listening()
        if self._pause is not None:
            self._pause.cancel()

    def _listen(self) -> None:
        if not self._is_listening:
            self._is_listening = True
            self._loop.add_reader(self._listener, self._on_connection)

    def _stop_listening(self) -> None:
        if self._is_listening:
            self._is_listening = False
            self._loop.remove_reader(self._listener)

    def _on_connection(self) -> None:
        fewest = self._row.table.fewest_connections()
        if fewest is not None and self._num_connections() > fewest:
            self._wait(YIELD_S)
        else:
            self._accept()

    def _wait(self, seconds: float) -> None:
        self._stop_listening()
        self._pause = self._loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        self._pause = None
        self._accept()
        if self._pause is None:
            self.look()

    def _accept(self) -> None:
        """Accepts one connection, unless another process was faster."""
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            logger.error("cannot accept a connection", extra={"errno": error.errno})
            self._wait(EXHAUSTED_S)
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._open(connection))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        self._row.set_connections(self._num_connections())

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection)
        except OSError:
            connection.close()  # the client has already gone

    def _num_connections(self) -> int:
        return self._num_open() + len(self._opening)
