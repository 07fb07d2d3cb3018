"""The media of a chat completion: those in its body are uploaded while it arrives; those that a
part names are found, fetched or put together.
"""

import re
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

from app.api.openai.fetching import MediaFetcher
from app.api.openai.fields import wrong
from app.api.openai.frame_lists import (
    TYPES_OF_LISTS,
    TYPES_OF_PICTURES,
    FrameList,
    PictureSink,
    PicturesSink,
)
from app.api.openai.messages import VideoPart
from app.api.openai.streamed_json import MEDIUM, Base64Sink, Sink
from app.api.post.intake import check_container, write_recognisable
from app.api.post.uploads import Uploads
from app.keys.entries import Principal, Scope
from app.video_store import VIDEO_ID, Upload, VideoLease
from dycoke_core.errors import UnreadableFrameError, VideoError
from dycoke_core.video import ReadLimits
from dycoke_core.video.frame_list import DEFAULT_FPS

_OCTETS = ("application/octet-stream",)
_MARKER = re.compile(re.escape(MEDIUM).replace(r"\{\}", "([0-9]{1,6})"))


@dataclass(slots=True, eq=False)
class BodyMedia:
    """What came in one body: a video, or a list of frames.

    Args:
        stack: ends the upload.
        max_frames: of a list.
    """

    uploads: Uploads
    principal: Principal
    stack: AsyncExitStack
    max_frames: int
    upload: Upload | None = None  # of a video
    frames: FrameList | None = None
    has_pictures: bool = False  # one by one, so that more may follow

    async def open_sink(self, kind: str, key: bytes) -> Sink:
        """Raises: ForbiddenError, InvalidFieldsError."""
        self.principal.require(Scope.UPLOAD)
        is_picture = key == b"video" and kind in TYPES_OF_PICTURES
        if not (is_picture or kind in _OCTETS or kind.startswith("video/")):
            raise wrong(
                "messages", f"data: URLs of type '{kind[:32]}' are not taken; send video/..."
            )
        is_first = self.upload is None and self.frames is None
        if not (is_first or (is_picture and self.has_pictures)):
            raise wrong("messages", "a conversation has one video, and this is a second one")
        if is_picture:
            self.has_pictures = True
            return await PictureSink.open(await self.open_list())
        if kind in TYPES_OF_LISTS:
            return await PicturesSink.open(await self.open_list())
        self.upload = upload = await self.stack.enter_async_context(
            self.uploads.receive(self.principal)
        )
        return Base64Sink(partial(write_recognisable, upload), max_bytes=upload.max_bytes)

    async def open_list(self) -> FrameList:
        """The list of frames, a new one where none has begun."""
        if self.frames is None:
            upload = await self.stack.enter_async_context(self.uploads.receive(self.principal))
            self.frames = FrameList(upload, max_frames=self.max_frames)
        return self.frames

    def is_list(self, part: VideoPart) -> bool:
        """Whether a part brings a list of frames, in its body or by URLs."""
        came_whole = part.source == MEDIUM.format(0) and self.frames is not None
        return bool(part.frames) or came_whole


class MediaFinder:
    """
    Args:
        fetcher: gets what a URL names.
    """

    def __init__(self, uploads: Uploads, fetcher: MediaFetcher) -> None:
        self._uploads = uploads
        self._fetcher = fetcher

    async def find(
        self, part: VideoPart, media: BodyMedia, principal: Principal
    ) -> tuple[VideoLease, float]:
        """Returns the medium that a part names, and the seconds that its probe took.

        Raises:
            DycokeError: a VideoError names the part.
        """
        try:
            if media.is_list(part):
                return await self._store_list(part, media, principal)
            if part.source == MEDIUM.format(0) and media.upload is not None:
                check_container(media.upload.head)
                return await self._uploads.store(media.upload, principal)
            if not VIDEO_ID.fullmatch(part.source):
                return await self._fetch(part, principal)
        except UnreadableFrameError as error:
            error.field = f"{part.param}.{error.number}" if part.frames else part.param
            raise
        except VideoError as error:
            error.field = part.param
            raise
        return await self._uploads.find(part.source, principal.owner), 0.0

    async def _fetch(self, part: VideoPart, principal: Principal) -> tuple[VideoLease, float]:
        principal.require(Scope.UPLOAD)
        async with self._uploads.receive(principal) as upload:
            write = partial(write_recognisable, upload)
            await self._fetcher.fetch(part.source, part.param, write, owner=principal.owner)
            check_container(upload.head)
            return await self._uploads.store(upload, principal)

    async def _store_list(
        self, part: VideoPart, media: BodyMedia, principal: Principal
    ) -> tuple[VideoLease, float]:
        principal.require(Scope.UPLOAD)
        if len(part.frames) > media.max_frames:
            raise wrong(part.param, f"a list may have at most {media.max_frames} frames")
        if part.frames and media.frames is not None and not media.has_pictures:
            raise wrong(part.param, "a list has its pictures one by one, or all in one URL")
        frames = await media.open_list()
        order = [
            await self._picture(url, f"{part.param}.{place}", frames, principal.owner)
            for place, url in enumerate(part.frames)
        ]
        order = order or list(range(len(frames.places)))
        fps = part.fps or DEFAULT_FPS
        if len(order) / fps > ReadLimits().max_duration_s:
            raise wrong(f"{part.param}.fps", "the list lasts too long at this rate")
        await frames.finish(order, fps)
        return await self._uploads.store(frames.upload, principal)

    async def _picture(self, url: str, param: str, frames: FrameList, owner: str) -> int:
        """The number of a picture in the order in which they came."""
        marker = _MARKER.fullmatch(url)
        if marker is not None:
            if int(marker[1]) >= len(frames.places):
                raise wrong(param, "must be a URL of a picture")
            return int(marker[1])
        if VIDEO_ID.fullmatch(url):
            raise wrong(param, "a frame is a picture, not a stored video")
        await frames.begin_picture(param)
        write = partial(frames.write, param=param)
        await self._fetcher.fetch(url, param, write, owner=owner)
        frames.end_picture(param)
        return len(frames.places) - 1
