"""Sends a client the frames that a model saw, as PNG.

A request of a few bytes can ask for megabytes. So only a few frames are fetched and encoded at a
time, keys take turns, and each frame counts as an open answer until its client has received it.
"""

import asyncio
import logging
from collections.abc import Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.answer.png import encode_png
from app.api.answer.video_content import STALL_S
from app.api.connection.streams import StreamSlot
from app.api.post.fair_budget import FairBudget
from app.store.frame_store import FrameStore

MAX_ENCODED = 2  # at a time in a process, whose threads also serve uploads and downloads

logger = logging.getLogger(__name__)


class FrameImages:
    def __init__(self, frames: FrameStore) -> None:
        self.frames = frames
        self._turn = FairBudget(MAX_ENCODED)

    async def png(self, digest: str, index: int, owner: str) -> bytes | None:
        """One frame; None if it is not stored.

        Waits: for others' pictures, which take the time to encode each.

        Raises:
            IndexError: the blob has fewer frames.
            StoreUnavailableError
        """
        async with self._turn.taken(1, owner):
            found = await self.frames.frame(digest, index)
            if found is None:
                return None
            header, pixels = found
            _, height, width, _ = header.shape
            return await asyncio.to_thread(encode_png, pixels, width=width, height=height)


class FrameImage(Response):
    """Takes over the slot: the picture counts as an open answer until it is sent."""

    media_type = "image/png"

    def __init__(
        self,
        png: bytes,
        slot: StreamSlot,
        *,
        headers: Mapping[str, str],
        stall_s: float = STALL_S,
    ) -> None:
        super().__init__(png, headers={"Cache-Control": "private, no-store", **headers})
        self._slot = slot
        self._stall_s = stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        try:
            async with asyncio.timeout(self._stall_s):
                await send(head)
                await send({"type": "http.response.body", "body": self.body, "more_body": True})
                # Waits until the client has taken nearly all of the last.
                await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            logger.info("a client took no more of a frame")
        finally:
            self._slot.release()
