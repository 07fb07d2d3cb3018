"""A video as the parent holds it: an open file that was recognised by its first bytes."""

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from dycoke_core.errors import UnreadableVideoError, UnsupportedContainerError
from dycoke_core.video.containers import SNIFF_BYTES, Container, sniff_container


@dataclass(frozen=True, slots=True)
class VideoFile:
    """Children get the descriptor, never the name, and so read the file that was sniffed."""

    fd: int
    container: Container


@asynccontextmanager
async def open_video(path: Path) -> AsyncIterator[VideoFile]:
    """Opens and recognises a file, off the event loop; closes it at the end.

    Raises:
        UnreadableVideoError: no regular file with something in it.
        UnsupportedContainerError: in no container that we take.
    """
    opening = asyncio.ensure_future(asyncio.to_thread(_open, path))
    try:
        video = await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_if_opened)  # the thread cannot be stopped
        raise
    try:
        yield video
    finally:
        os.close(video.fd)


def _open(path: Path) -> VideoFile:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # never waits for a pipe
    except OSError as error:
        raise UnreadableVideoError("the video file cannot be opened") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UnreadableVideoError("the video is not a regular file")
        head = os.pread(fd, SNIFF_BYTES, 0)
        if not head:
            raise UnreadableVideoError("the video is empty: send the file's bytes")
        container = sniff_container(head)
        if container is None:
            raise UnsupportedContainerError
    except BaseException:
        os.close(fd)
        raise
    return VideoFile(fd, container)


def _close_if_opened(opening: "asyncio.Future[VideoFile]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result().fd)
