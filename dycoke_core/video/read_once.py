"""Reading one video in a program without an event loop."""

import asyncio
from pathlib import Path

from dycoke_core.video.frame_readers import FrameReaders
from dycoke_core.video.types import FrameSpec, ReadLimits, VideoFrames


def read_video_frames(
    path: Path,
    spec: FrameSpec,
    limits: ReadLimits | None = None,
    *,
    allow_unsandboxed: bool = False,
) -> VideoFrames:
    """`FrameReaders.read` for a program without an event loop; starts the readers and ends them."""

    async def read() -> VideoFrames:
        readers = FrameReaders(
            limits or ReadLimits(), max_readers=1, allow_unsandboxed=allow_unsandboxed
        )
        try:
            return await readers.read(path, spec)
        finally:
            await readers.aclose()

    return asyncio.run(read())
