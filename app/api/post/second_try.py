"""Frame readers that give a video one more try when its reader was lost.

If a reader is killed from outside, the cause may be its own video's memory or something else:
another video's memory, an operator, the end of the server that all readers are forked from. So the
second try runs alone: if the reader is lost again while no other reader runs, its video is to
blame. That holds up all other readers, so an owner gets one such try at a time. Meanwhile its other
videos are tried again next to other readers, and if they are killed there, the client may send them
again later.

A crash, or running out of memory within the child's own limit, is mostly the video's doing and has
nothing to do with its neighbours, so the second try is an ordinary one. CPU time is certainly used
up by the video, so there is no second try.
"""

import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from app.api.post.reader_slots import ReaderSlots
from dycoke_core.errors import ReadersUnavailableError, VideoError, VideoReaderKilledError
from dycoke_core.video import FrameReaders, FrameSpec, VideoFrames, VideoProbe

MIN_TIMEOUT_S = 1.0  # left for the second try

# A warning, if only a second try could have shown whether the loss repeats.
_NO_SECOND_TRY = "a second try with decord did not come to its end"

T = TypeVar("T")


class SecondTryReaders:
    """Like `FrameReaders`, within the slots that all API processes share."""

    def __init__(self, readers: FrameReaders, slots: ReaderSlots) -> None:
        self._readers = readers
        self._slots = slots

    async def probe(self, path: Path, owner: str) -> tuple[VideoProbe, float]:
        """Also returns the seconds that it took, without the wait for a slot.

        Raises: VideoError, ReadersUnavailableError.
        """
        try:
            async with self._slots.to_probe(owner):
                return await self._timed_probe(path)
        except VideoReaderKilledError as error:
            if error.cause == "cpu":
                raise
            cause = error.cause
        return await self._again(
            cause, owner, self._slots.to_probe, lambda: self._timed_probe(path)
        )

    async def _timed_probe(self, path: Path) -> tuple[VideoProbe, float]:
        began_at = time.monotonic()
        probe = await self._readers.probe(path)
        return probe, time.monotonic() - began_at

    async def read(
        self,
        path: Path,
        spec: FrameSpec,
        *,
        owner: str,
        on_progress: Callable[[float], None] | None = None,
        timeout_s: float,
    ) -> VideoFrames:
        """
        Args:
            owner: in whose turn it gets a slot.
            timeout_s: for both tries together, without the wait between them.

        Raises:
            VideoError
            InvalidRequestError
            ReadersUnavailableError
        """
        began_at = time.monotonic()
        frames = None
        try:
            async with self._slots.to_read(owner):
                began_at = time.monotonic()
                frames = await self._readers.read(
                    path, spec, on_progress=on_progress, timeout_s=timeout_s
                )
            loss: str = frames.fallback_cause or ""
            if loss not in ("killed", "memory", "crash"):
                return frames
        except VideoReaderKilledError as error:
            if error.cause == "cpu":
                raise
            loss = error.cause
        left_s = max(timeout_s - (time.monotonic() - began_at), MIN_TIMEOUT_S)
        try:
            return await self._again(
                loss,
                owner,
                self._slots.to_read,
                lambda: self._readers.read(path, spec, on_progress=on_progress, timeout_s=left_s),
            )
        except (VideoError, ReadersUnavailableError):
            if frames is None:
                raise
            # Nobody knows whether the loss would repeat, so it counts like one from outside.
            warnings = (*frames.warnings, _NO_SECOND_TRY)
            return replace(frames, warnings=warnings, fallback_cause="killed")

    async def _again(
        self,
        loss: str,
        owner: str,
        slot: Callable[[str], AbstractAsyncContextManager[None]],
        attempt: Callable[[], Awaitable[T]],
    ) -> T:
        """The second try, in the kind of slot that fits how the first one's reader was lost."""
        if loss == "killed":
            async with self._slots.alone(owner) as is_alone:
                if is_alone:
                    return await attempt()
        async with slot(owner):
            try:
                return await attempt()
            except VideoReaderKilledError as error:
                if error.cause != "killed":
                    raise
                raise ReadersUnavailableError(
                    "the readers of this video were killed, and others with them: try again"
                ) from error


def fell_back_after_kill(frames: VideoFrames) -> bool:
    """Whether a SIGKILL is why these frames are the second reader's: another time they may be the
    first one's. A crash that came twice is reproducible, and no such case.
    """
    return frames.fallback_cause == "killed"
