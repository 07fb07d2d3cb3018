"""The API's process: uvicorn, a listening socket, and a shutdown that interrupts no answer early.

SIGTERM or SIGINT: `/readyz` turns 503 and posts are refused, but the port stays open and answers
continue for up to `drain_timeout_s`. Then open answers end (their jobs do not), jobs whose frames
are still being read are left to other APIs, and the process exits with 0. A second signal skips the
wait. If other processes on the port are not draining, new connections go to them.
"""

import asyncio
import logging
import resource
import signal
import socket
import sys
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from app.api.app import ReadersDoNotStartError, create_app
from app.api.connection.acceptor import Acceptor
from app.api.connection.drain import Drain
from app.api.connection.http_protocol import HTTP_PROTOCOL
from app.api.context import Api
from app.api.listener import bind
from app.api.pool import Inherited
from app.errors import ShuttingDownError
from app.process_table import ProcessRow, ProcessTable
from app.settings import Settings
from app.supervisor import EXIT_BAD_SETTINGS
from dycoke_core.errors import SandboxUnavailableError

logger = logging.getLogger(__name__)

EXIT_FAILED = 1  # a supervisor starts it again
MAX_OPEN_FILES = 65_536
CLOSE_TIMEOUT_S = 2  # how long connections may stay once everything on them has ended


def run(settings: Settings, inherited: Inherited | None = None) -> int:
    """Serves until a signal. Returns the process's exit code.

    Args:
        inherited: if this is one of several processes on the port.
    """
    raise_open_file_limit()
    try:
        if inherited is None:
            app = create_app(settings)
            listener = bind(settings.host, settings.port)
        else:
            table = ProcessTable(inherited.table_fd)
            app = create_app(settings, row=table.take_row(inherited.number))
            listener = socket.socket(fileno=inherited.listener_fd)
    except ReadersDoNotStartError as error:
        logger.error("%s", error)
        return EXIT_FAILED
    except SandboxUnavailableError as error:
        print(f"dycoke: {error}; see DYCOKE_ALLOW_UNSANDBOXED", file=sys.stderr)
        return EXIT_BAD_SETTINGS
    except (ValueError, OSError) as error:
        print(f"dycoke: {error}", file=sys.stderr)
        return EXIT_BAD_SETTINGS
    with listener:
        logger.info("listening on http://%s:%d", settings.host, listener.getsockname()[1])
        ApiServer(app, settings).run(sockets=[listener])
    return 0


class ApiServer(uvicorn.Server):
    """Drains before it shuts down."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            http=HTTP_PROTOCOL,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            # Otherwise a local client could claim any address as its own.
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=settings.trusted_proxies,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        )
        super().__init__(config)
        self._app = app
        self._drain: Drain = app.state.drain
        self._row: ProcessRow = app.state.row
        self._acceptor: Acceptor | None = None
        self._drain_timeout_s = settings.drain_timeout_s
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Replaces uvicorn's, which would accept a whole burst of connections: see `Acceptor`."""
        await super().startup(sockets=[])
        (listener,) = sockets or []
        listener.setblocking(False)
        make_protocol = partial(  # type: ignore[call-arg]
            self.config.http_protocol_class,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        self._acceptor = Acceptor(
            listener,
            make_protocol,
            self._row,
            lambda: len(self.server_state.connections),
        )
        self._acceptor.look()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self._acceptor is not None:
            self._acceptor.look()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._acceptor is not None:
            self._acceptor.close()
        self._row.leave()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal handler, in the thread that runs the event loop."""
        logger.info("%s: shutting down", signal.Signals(sig).name)
        asyncio.get_running_loop().call_soon_threadsafe(self.begin_drain)

    def begin_drain(self) -> None:
        if self._draining is not None:
            self._drain.expire()
            return
        self._drain.begin()
        self._row.begin_drain()
        if self._acceptor is not None:
            self._acceptor.begin_drain()
        self._draining = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        try:
            async with self._drain.until_expired(), asyncio.timeout(self._drain_timeout_s):
                if hasattr(self._app.state, "api"):  # else it has not started yet
                    api: Api = self._app.state.api
                    await api.wait_until_idle()
        except (TimeoutError, ShuttingDownError):
            logger.info("ending what is still open")
        finally:
            self._drain.expire()
            self.should_exit = True


def raise_open_file_limit() -> None:
    """Every client takes a descriptor, and many systems start processes with 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = hard == resource.RLIM_INFINITY
    wanted = MAX_OPEN_FILES if unlimited else min(hard, MAX_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
