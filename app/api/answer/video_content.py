"""Sends a client a stored video's bytes, whole or in ranges.

A client that takes nothing for `STALL_S` is treated as gone; otherwise it could hold the video
forever.
"""

import asyncio
import logging
from collections.abc import Mapping

from starlette.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from app.api.connection.streams import StreamSlot
from app.api.errors import response_for
from app.errors import RangeNotSatisfiableError
from app.video_store import StoredVideo, VideoLease
from dycoke_core.video import Container

logger = logging.getLogger(__name__)

STALL_S = 60.0

_MEDIA_TYPES: Mapping[str, tuple[str, str]] = {
    "mp4": ("video/mp4", "mp4"),
    "matroska": ("video/x-matroska", "mkv"),
    "avi": ("video/x-msvideo", "avi"),
    "mpegts": ("video/mp2t", "ts"),
    Container.FRAMES: ("application/octet-stream", "frames"),
}


def file_name(video: StoredVideo) -> str:
    """The video's id and its container's extension: clients' file names are not kept."""
    return f"{video.video_id}.{_MEDIA_TYPES.get(video.probe.container, ('', 'bin'))[1]}"


class _StalledError(Exception):
    pass


class _RangeRefusedError(Exception):
    """Starlette's refusal, which is plain text without a code, is not sent."""


class VideoContent(FileResponse):
    """Takes over lease and slot: the video stays and counts as an open answer until it is sent."""

    def __init__(self, lease: VideoLease, slot: StreamSlot, *, stall_s: float = STALL_S) -> None:
        media_type, _ = _MEDIA_TYPES.get(
            lease.video.probe.container, ("application/octet-stream", "")
        )
        super().__init__(
            lease.path,
            media_type=media_type,
            filename=file_name(lease.video),
            headers={
                "Cache-Control": "private, no-store",
                # A browser must not run what a client uploaded.
                "Content-Security-Policy": "sandbox",
                "X-Content-Type-Options": "nosniff",
            },
        )
        self._lease = lease
        self._slot = slot
        self._stall_s = stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                raise _RangeRefusedError
            try:
                async with asyncio.timeout(self._stall_s):
                    await send(message)
            except TimeoutError:
                raise _StalledError from None

        try:
            await super().__call__(scope, receive, send_in_time)
        except _RangeRefusedError:
            await self._refuse_range(scope, receive, send)
        except _StalledError:
            logger.info("a client took no more of a video; its download ends")
        finally:
            self._slot.release()
            self._lease.release()

    async def _refuse_range(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = self.headers["content-length"]
        refusal = response_for(
            RangeNotSatisfiableError(
                f"the video has {num_bytes} bytes, and none of those asked for"
            )
        )
        refusal.headers["Content-Range"] = f"bytes */{num_bytes}"
        await refusal(scope, receive, send)
