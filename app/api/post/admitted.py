"""A request that is all there, and what it holds until its frames are being read."""

from typing import Self

from app.api.post.admission import Place
from app.video_store import VideoLease


class Admitted:
    """Owns a video and then a place in the queue. Both are given back when the block is left,
    unless they have been handed over.
    """

    def __init__(self) -> None:
        self._place: Place | None = None
        self._video: VideoLease | None = None  # stays None for a conversation without one

    @property
    def job_id(self) -> str:
        return self._held_place.job_id

    def hold(self, video: VideoLease | None) -> None:
        self._video = video

    def take(self, place: Place) -> None:
        self._place = place

    async def forsake(self) -> None:
        """Keeps the place no longer, nor gives it up: the job has it, or there may be one on it,
        for another API to read.
        """
        if self._place is not None:
            await self._place.stop_renewing()
            self._place = None

    def hand_over(self) -> Place:
        """Passes the place on, and with it the video; the caller must give both back."""
        place = self._held_place
        self._place = self._video = None
        return place

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._video is not None:
            self._video.release()
        if self._place is not None:
            await self._place.release()

    @property
    def _held_place(self) -> Place:
        assert self._place is not None, "no place yet, or it is handed over"
        return self._place
