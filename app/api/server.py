"""The API's process: uvicorn, a listening socket, and a shutdown that breaks no answer.

SIGTERM or SIGINT: `/readyz` turns 503 and posts are refused, while the port stays open and answers
go on for up to `drain_timeout_s`; then open answers end (their jobs do not), jobs whose frames are
still being read are left to other APIs, and the process exits with 0. A second signal skips the
wait.
"""

import asyncio
import logging
import resource
import signal
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from app.api.app import ReadersDoNotStartError, create_app
from app.api.connection.drain import Drain
from app.api.connection.http_protocol import HTTP_PROTOCOL
from app.api.context import Api
from app.errors import ShuttingDownError
from app.settings import Settings
from app.supervisor import EXIT_BAD_SETTINGS
from dycoke_core.errors import SandboxUnavailableError

logger = logging.getLogger(__name__)

# A peer that acknowledges nothing, or keeps its window shut, for this long is gone.
PEER_TIMEOUT_MS = 60_000
EXIT_FAILED = 1  # a supervisor starts it again
BACKLOG = 128  # connections that the event loop accepts at once
MAX_OPEN_FILES = 65_536
CLOSE_TIMEOUT_S = 2  # for connections, once everything on them has ended


def run(settings: Settings) -> int:
    """Serves until a signal. Returns the process's exit code."""
    raise_open_file_limit()
    try:
        app = create_app(settings)
        listener = bind(settings.host, settings.port)
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
            backlog=BACKLOG,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        )
        super().__init__(config)
        self._app = app
        self._drain: Drain = app.state.drain
        self._drain_timeout_s = settings.drain_timeout_s
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal handler, in the thread that runs the event loop."""
        logger.info("%s: shutting down", signal.Signals(sig).name)
        asyncio.get_running_loop().call_soon_threadsafe(self.begin_drain)

    def begin_drain(self) -> None:
        if self._draining is not None:
            self._drain.expire()
            return
        self._drain.begin()
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
    """Every client is a descriptor, and many systems start processes with 1,024 of them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = hard == resource.RLIM_INFINITY
    wanted = MAX_OPEN_FILES if unlimited else min(hard, MAX_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def bind(host: str, port: int) -> socket.socket:
    """Returns a listening socket; port 0 takes any free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, PEER_TIMEOUT_MS)
    return listener
