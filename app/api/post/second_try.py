"""Frame readers that give a video one more try, alone, when its reader was killed.

A reader that dies without a word may have been killed by the video, or from outside: by the
kernel's out-of-memory killer, an operator, the end of the server that all readers are forked from.
Only a video that loses its reader twice, the second time with no other beside it, is to blame.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from dycoke_core.errors import VideoError, VideoReaderKilledError
from dycoke_core.video import FrameReaders, FrameSpec, VideoFrames, VideoProbe

MIN_TIMEOUT_S = 1.0  # left for the second try

# What the readers warn of: why the first of them was lost and the second stood in.
_FELL_BACK = re.compile(r"decord could not read this video \((\w+)\)")
# Ours, where the second try would have said whether that comes twice.
_NO_SECOND_TRY = "a second try with decord did not come to its end"


class SecondTryReaders:
    """As `FrameReaders`.

    Args:
        timeout_s: of a read, both tries together, without the wait between them.
    """

    def __init__(self, readers: FrameReaders, *, timeout_s: float) -> None:
        self._readers = readers
        self._timeout_s = timeout_s
        self._gate = _Gate()

    @property
    def kills(self) -> Mapping[str, int]:
        return self._readers.kills

    async def probe(self, path: Path) -> VideoProbe:
        """Raises: VideoError."""
        try:
            async with self._gate.beside_others():
                return await self._readers.probe(path)
        except VideoReaderKilledError:
            async with self._gate.alone():
                return await self._readers.probe(path)

    async def read(
        self,
        path: Path,
        spec: FrameSpec,
        *,
        on_progress: Callable[[float], None] | None = None,
        timeout_s: float | None = None,
    ) -> VideoFrames:
        """Raises: VideoError, InvalidRequestError."""
        limit_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        began_at = time.monotonic()
        frames = None
        try:
            async with self._gate.beside_others():
                began_at = time.monotonic()
                frames = await self._readers.read(
                    path, spec, on_progress=on_progress, timeout_s=limit_s
                )
            loss = _loss_before_fallback(frames)
            if loss not in ("memory", "crash"):
                return frames
        except VideoReaderKilledError:
            loss = "killed"
        left_s = max(limit_s - (time.monotonic() - began_at), MIN_TIMEOUT_S)
        # A crash is mostly the video's doing, or that of the server's end; neighbours have no part.
        gate = self._gate.beside_others() if loss == "crash" else self._gate.alone()
        try:
            async with gate:
                return await self._readers.read(
                    path, spec, on_progress=on_progress, timeout_s=left_s
                )
        except VideoError:
            if frames is None:
                raise
            return replace(frames, warnings=(*frames.warnings, _NO_SECOND_TRY))

    async def aclose(self) -> None:
        await self._readers.aclose()


def fell_back_after_kill(frames: VideoFrames) -> bool:
    """Whether a SIGKILL is why these frames are the second reader's: another time they may be the
    first one's. A crash that came twice is reproducible, and no such case.
    """
    return _loss_before_fallback(frames) == "memory" or _NO_SECOND_TRY in frames.warnings


def _loss_before_fallback(frames: VideoFrames) -> str | None:
    matches = (_FELL_BACK.match(warning) for warning in frames.warnings)
    return next((match[1] for match in matches if match), None)


class _Gate:
    """Lets through many beside one another, or one alone. Who wants to be alone goes first."""

    def __init__(self) -> None:
        self._num_inside = 0
        self._num_waiting_alone = 0
        self._is_alone = False
        self._has_changed = asyncio.Event()

    @asynccontextmanager
    async def beside_others(self) -> AsyncIterator[None]:
        while self._is_alone or self._num_waiting_alone:
            await self._has_changed.wait()
        self._num_inside += 1
        try:
            yield
        finally:
            self._num_inside -= 1
            self._tell()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        self._num_waiting_alone += 1
        try:
            while self._is_alone or self._num_inside:
                await self._has_changed.wait()
            self._is_alone = True
        finally:
            self._num_waiting_alone -= 1
            self._tell()
        try:
            yield
        finally:
            self._is_alone = False
            self._tell()

    def _tell(self) -> None:
        self._has_changed.set()
        self._has_changed = asyncio.Event()
