"""Adopts jobs whose API died, or never learnt of them, while their frames were to be read: any API
that has the video reads them.
"""

import logging
from contextlib import suppress

from app.api.connection.drain import Drain
from app.api.post.places import Place
from app.api.post.reading import FrameReading, Reading
from app.api.post.wanted_frames import WantedFrames, wanted_spec
from app.errors import JobNotFoundError, ReaderLostError, VideoNotFoundError
from app.messages import ErrorEvent, JobRequest, JobState
from app.store.job_queue import JobQueue, Orphan
from app.video_store import VideoStore
from dycoke_core.errors import DycokeError

logger = logging.getLogger(__name__)


class Orphans:
    def __init__(
        self,
        queue: JobQueue,
        videos: VideoStore,
        reading: FrameReading,
        drain: Drain,
        *,
        lease_s: float,
        read_timeout_s: float,
    ) -> None:
        self._queue = queue
        self._videos = videos
        self._reading = reading
        self._drain = drain
        self._lease_s = lease_s
        self._read_timeout_s = read_timeout_s

    async def adopt(self, orphan: Orphan) -> None:
        """Starts reading, unless another API is faster. Ends a job that cannot be read here."""
        if self._drain.is_draining or self._reading.has(orphan.job_id):
            return  # its own: renewal of the place resumes when Redis is back
        adopted = await self._queue.adopt(orphan, lease_s=self._lease_s)
        if adopted is None:
            return
        request, reader = adopted
        logger.warning("job adopted", extra=request.log_fields)
        try:
            await self._start(request, reader)
        except DycokeError as error:
            event = ErrorEvent.of(error, request.job_id)
            with suppress(JobNotFoundError):
                await self._queue.end(request.job_id, JobState.ERROR, event)

    async def _start(self, request: JobRequest, reader: int) -> None:
        wanted = await self._wanted(request)
        place = Place.held(self._queue, request.model, request.job_id, lease_s=self._lease_s)
        self._reading.start(Reading(request, wanted, place, self._read_timeout_s, reader))

    async def _wanted(self, request: JobRequest) -> WantedFrames | None:
        """None for a job without a video."""
        if request.video_id is None:
            return None
        lost = ReaderLostError()
        spec = wanted_spec(request)
        if spec is None:
            raise lost
        try:
            video = await self._videos.lease(request.video_id, request.owner)
        except VideoNotFoundError:
            raise lost from None
        return WantedFrames.of(spec, video, cache_salt=request.cache_salt)
