"""Jobs by id: their record, their events, how they ended."""

import re

from app.api.answer.feed import JobFeed
from app.errors import JobLostError, JobNotFoundError
from app.messages import FINAL_EVENTS, DoneEvent, ErrorEvent, FramesRef
from app.store.event_log import FIRST_EVENT, EventLog, LoggedEvent
from app.store.event_reader import EventReader
from app.store.job_queue import JobQueue, JobRecord

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Jobs:
    """Args:
    heartbeat_s: silence after which a feed yields an empty batch.
    """

    def __init__(
        self, queue: JobQueue, log: EventLog, reader: EventReader, *, heartbeat_s: float
    ) -> None:
        self.queue = queue
        self._log = log
        self._reader = reader
        self._heartbeat_s = heartbeat_s

    async def find(self, job_id: str, owner: str) -> JobRecord:
        """Raises: JobNotFoundError; another owner's job looks like one that never existed."""
        if not _JOB_ID.fullmatch(job_id):
            raise JobNotFoundError
        record = await self.queue.get(job_id)
        if record.request.owner != owner:
            raise JobNotFoundError
        return record

    async def frames(self, job_id: str, video_id: str, owner: str) -> FramesRef:
        """Which frames of a video a job is about. Raises: JobNotFoundError."""
        request = (await self.find(job_id, owner)).request
        if request.video_id != video_id or request.frames is None:
            raise JobNotFoundError(
                "the job of 'job_id' is not about this video, or its frames are not read yet"
            )
        return request.frames

    def feed(
        self, record: JobRecord, *, after: str = FIRST_EVENT, opening: LoggedEvent | None = None
    ) -> JobFeed:
        return JobFeed(
            self.queue,
            self._reader,
            record,
            after=after,
            opening=opening,
            heartbeat_s=self._heartbeat_s,
        )

    async def is_read_to_its_end(self, record: JobRecord, *, after: str) -> bool:
        """Whether a job has ended and nothing comes after this event."""
        if not record.state.is_final:
            return False
        return not await self._log.read(record.job_id, after=after)

    async def final(self, record: JobRecord) -> DoneEvent | ErrorEvent | None:
        """How a job ended, or None if it has not."""
        if not record.state.is_final:
            return None
        last = await self._log.last(record.job_id)
        if isinstance(last, FINAL_EVENTS):
            return last
        return ErrorEvent.of(
            JobLostError("the job's events are gone: post the request again"), record.job_id
        )
