"""Frame readers that give a video one more try, alone, when its reader was killed.

A reader that dies silently may have been killed by the video, or from outside: by the
kernel's out-of-memory killer, an operator, the end of the server that all readers are forked from.
Only a video that loses its reader twice, the second time with no other reader running, is to blame.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from app.api.post.reader_slots import ReaderSlots
from dycoke_core.errors import ReadersUnavailableError, VideoError, VideoReaderKilledError
from dycoke_core.video import FrameReaders, FrameSpec, VideoFrames, VideoProbe

MIN_TIMEOUT_S = 1.0  # left for the second try

# A warning, where the second try would have said whether a loss comes twice.
_NO_SECOND_TRY = "a second try with decord did not come to its end"


class SecondTryReaders:
    """As `FrameReaders`, within the slots that all API processes share."""

    def __init__(self, readers: FrameReaders, slots: ReaderSlots) -> None:
        self._readers = readers
        self._slots = slots

    async def probe(self, path: Path, owner: str) -> tuple[VideoProbe, float]:
        """Returns also the seconds that it took, without the wait for a slot.

        Raises: VideoError, ReadersUnavailableError.
        """
        try:
            async with self._slots.to_probe(owner):
                return await self._timed_probe(path)
        except VideoReaderKilledError:
            async with self._slots.alone():
                return await self._timed_probe(path)

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
            owner: whose turn it is to have a slot.
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
            loss = frames.fallback_cause
            if loss not in ("killed", "memory", "crash"):
                return frames
        except VideoReaderKilledError:
            loss = "killed"
        left_s = max(timeout_s - (time.monotonic() - began_at), MIN_TIMEOUT_S)
        # A crash is mostly the video's doing; neighbours have no part in it.
        slot = self._slots.to_read(owner) if loss == "crash" else self._slots.alone()
        try:
            async with slot:
                return await self._readers.read(
                    path, spec, on_progress=on_progress, timeout_s=left_s
                )
        except (VideoError, ReadersUnavailableError):
            if frames is None:
                raise
            # Nobody knows whether the loss comes twice: no better than one from outside.
            warnings = (*frames.warnings, _NO_SECOND_TRY)
            return replace(frames, warnings=warnings, fallback_cause="killed")


def fell_back_after_kill(frames: VideoFrames) -> bool:
    """Whether a SIGKILL is why these frames are the second reader's: another time they may be the
    first one's. A crash that came twice is reproducible, and no such case.
    """
    return frames.fallback_cause == "killed"
