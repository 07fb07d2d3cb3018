"""The file system calls of the store's modules. Everything here blocks."""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from app.errors import StoreUnavailableError, VideoStoreFullError

UNLOCKED_GRACE_S = 60.0  # a file may be this young and not locked yet
LOCK_TIMEOUT_S = 10.0
POLL_S = 0.01


class DirectoryLock:
    """Held by one thread at a time, of all processes that share a directory.

    It goes with its process. Waits: for the holder, at most `LOCK_TIMEOUT_S`. What holders do takes
    an instant, so a longer wait means that a process, or the storage, is stuck.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = threading.Lock()  # of this process, who wait for one another without a poll

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises: StoreUnavailableError: it is held for too long by somebody else."""
        give_up_at = time.monotonic() + LOCK_TIMEOUT_S
        if not self._threads.acquire(timeout=LOCK_TIMEOUT_S):
            raise _stuck()
        try:
            fd = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                _lock(fd, give_up_at)
                yield
            finally:
                os.close(fd)
        finally:
            self._threads.release()


def _lock(fd: int, give_up_at: float) -> None:
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() > give_up_at:
            raise _stuck()
        time.sleep(POLL_S)


def _stuck() -> StoreUnavailableError:
    return StoreUnavailableError("the video storage does not answer: try again")


@contextmanager
def full_disk_told() -> Iterator[None]:
    """Raises: VideoStoreFullError: there is no room on the disk, or in this user's share of it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise VideoStoreFullError(
                "the disk of the video storage is full: delete videos, or try again later"
            ) from error
        raise


def scan(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files of a directory; those that vanish meanwhile are left out."""
    with os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    yield Path(entry.path), entry.stat(follow_symlinks=False)


def folders(directory: Path) -> list[Path]:
    with os.scandir(directory) as entries:
        return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]


def is_old(status: os.stat_result) -> bool:
    return time.time() - status.st_mtime > UNLOCKED_GRACE_S


def remove_unlocked(path: Path) -> None:
    """Removes a file that is not locked."""
    with suppress(FileNotFoundError, BlockingIOError):
        fd = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        finally:
            os.close(fd)
