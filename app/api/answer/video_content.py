"""A stored video's bytes on their way to a client, whole or in ranges."""

from collections.abc import Mapping

from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

from app.api.connection.streams import StreamSlot
from app.video_store import StoredVideo, VideoLease
from dycoke_core.video import Container

_MEDIA_TYPES: Mapping[str, tuple[str, str]] = {
    "mp4": ("video/mp4", "mp4"),
    "matroska": ("video/x-matroska", "mkv"),
    "avi": ("video/x-msvideo", "avi"),
    "mpegts": ("video/mp2t", "ts"),
    Container.FRAMES: ("application/octet-stream", "frames"),
}


def file_name(video: StoredVideo) -> str:
    """No client's name is kept: the id, and what the container is called."""
    return f"{video.video_id}.{_MEDIA_TYPES.get(video.probe.container, ('', 'bin'))[1]}"


class VideoContent(FileResponse):
    """Takes over lease and slot: the video stays, and counts as an open answer, until it is out."""

    def __init__(self, lease: VideoLease, slot: StreamSlot) -> None:
        media_type, _ = _MEDIA_TYPES.get(
            lease.video.probe.container, ("application/octet-stream", "")
        )
        super().__init__(
            lease.path,
            media_type=media_type,
            filename=file_name(lease.video),
            headers={
                "Cache-Control": "private, no-store",
                # What a client uploaded is nothing that a browser should run here.
                "Content-Security-Policy": "sandbox",
                "X-Content-Type-Options": "nosniff",
            },
        )
        self._lease = lease
        self._slot = slot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._slot.release()
            self._lease.release()
