"""Receives lists of frames as an upload: pictures as `data:` URLs, each on its own or all in one,
separated by commas.

Pictures are written as they arrive and recognised by their first bytes; nothing here decodes one.
"""

from collections.abc import Sequence

from app.api.openai.fields import wrong
from app.api.openai.streamed_json import Base64Sink
from app.video_store import Upload
from dycoke_core.video.frame_list import (
    MAGIC,
    PICTURE_HEAD_BYTES,
    encode_index,
    sniff_picture,
)

# All frames of a list in one URL; clients mean by it whatever pictures follow.
TYPES_OF_LISTS = ("video/jpeg", "video/png", "video/webp")
TYPES_OF_PICTURES = ("image/jpeg", "image/jpg", "image/png", "image/webp")


class FrameList:
    """Writes one list into an upload.

    Args:
        max_frames: that it may have.
    """

    def __init__(self, upload: Upload, *, max_frames: int) -> None:
        self.upload = upload
        self.places: list[tuple[int, int]] = []  # offset and bytes of each picture, as they came
        self._max_frames = max_frames
        self._head = b""

    async def begin_picture(self, param: str = "messages") -> None:
        """Raises: InvalidFieldsError: there are more than are taken."""
        if len(self.places) == self._max_frames:
            raise wrong(param, f"a list may have at most {self._max_frames} frames")
        if not self.places:
            await self.upload.write(MAGIC)
        self.places.append((self.upload.num_bytes, 0))
        self._head = b""

    async def write(self, data: bytes, param: str = "messages") -> None:
        """Takes a picture's next bytes; refuses what is none before the rest comes.

        Raises:
            InvalidFieldsError
            UploadTooLargeError: all of them together are too much.
            VideoStoreFullError
        """
        was_recognisable = len(self._head) == PICTURE_HEAD_BYTES
        self._head += data[: PICTURE_HEAD_BYTES - len(self._head)]
        if not was_recognisable and len(self._head) == PICTURE_HEAD_BYTES:
            self._check_head(param)
        await self.upload.write(data)
        offset, num_bytes = self.places[-1]
        self.places[-1] = (offset, num_bytes + len(data))

    def end_picture(self, param: str = "messages") -> None:
        """Raises: InvalidFieldsError."""
        if len(self._head) < PICTURE_HEAD_BYTES:
            self._check_head(param)

    async def finish(self, order: Sequence[int], fps: float) -> None:
        """Writes what is left once all pictures are there.

        Args:
            order: numbers of the pictures, as they came, in the order in which they are shown.
            fps: of the list.
        """
        await self.upload.write(encode_index([self.places[number] for number in order], fps))

    def _check_head(self, param: str) -> None:
        if sniff_picture(self._head) is None:
            at = f"frame {len(self.places) - 1}"
            raise wrong(param, f"{at} is no JPEG, PNG or WebP picture")


class PictureSink:
    """One picture in base64, into a list."""

    def __init__(self, frames: FrameList) -> None:
        self._frames = frames
        self._base64 = Base64Sink(frames.write, max_bytes=frames.upload.max_bytes)

    @classmethod
    async def open(cls, frames: FrameList) -> "PictureSink":
        await frames.begin_picture()
        return cls(frames)

    async def take(self, text: bytes) -> None:
        await self._base64.take(text)

    async def finish(self) -> None:
        await self._base64.finish()
        self._frames.end_picture()


class PicturesSink:
    """Pictures in base64, separated by commas, into a list."""

    def __init__(self, frames: FrameList, first: PictureSink) -> None:
        self._frames = frames
        self._picture = first

    @classmethod
    async def open(cls, frames: FrameList) -> "PicturesSink":
        return cls(frames, await PictureSink.open(frames))

    async def take(self, text: bytes) -> None:
        first, *others = text.split(b",")
        await self._picture.take(first)
        for other in others:
            await self._picture.finish()
            self._picture = await PictureSink.open(self._frames)
            await self._picture.take(other)

    async def finish(self) -> None:
        await self._picture.finish()
