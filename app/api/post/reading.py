"""Reads a job's frames: from `create` until the job is in the queue.

A reading belongs to the process, not to the connection that posted the job. Jobs about the same
frames share one read, if their cache salt is the same too. A reading ends early by `cancel`, if the
job ends elsewhere (another API's DELETE, its deadline), or if it loses its place. Readings are
bounded by the queue: each holds a place, and has reserved room in Redis for its frames before they
are read. Pixels are held from the reader until they are stored, under a limit. Keys take turns,
both for that and for a reader.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from app.api.errors import INTERNAL_ERROR, incident_message, log_incident
from app.api.post.fair_budget import FairBudget
from app.api.post.places import Place
from app.api.post.second_try import SecondTryReaders, fell_back_after_kill
from app.api.post.wanted_frames import WantedFrames, with_frames
from app.errors import JobNotFoundError, StoreUnavailableError
from app.messages import ErrorEvent, JobRequest, JobState, StatusEvent, cached_video
from app.metrics import ApiMetrics
from app.store.client import CALL_TIMEOUT_S
from app.store.frame_store import (
    FramesHeader,
    FrameStore,
    encode_frames,
    header_of,
    own_digest,
)
from app.store.job_queue import JobQueue
from app.tracing import Tracing
from dycoke_core.errors import DycokeError

logger = logging.getLogger(__name__)

PROGRESS_S = 0.5  # between two status events
RETRY_S = 0.5

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Reading:
    """One job's reading, and what it holds."""

    request: JobRequest
    wanted: WantedFrames | None  # None: a job without a video, which is queued at once
    place: Place
    read_timeout_s: float  # the reading time that the probe has left
    reader: int = 0  # the reader's number, if earlier ones were lost
    found: FramesHeader | None = None  # the header of the frames, if they are stored and pinned


@dataclass(frozen=True, slots=True)
class _ReadFrames:
    """Args:
    is_own: the job's own; others should not find them.
    """

    header: FramesHeader
    blob: bytes
    is_own: bool


@dataclass(slots=True, eq=False)
class _SharedRead:
    """One read of some frames, kept while any job waits for it, in the turn of the first job."""

    owner: str
    task: asyncio.Task[_ReadFrames] | None = None
    num_waiting: int = 0
    progress: float = 0.0
    held_bytes: int = 0  # frames that have been read
    storing: asyncio.Lock = field(default_factory=asyncio.Lock)  # so that only one job sends them


class FrameReading:
    """
    Args:
        max_held_bytes: the most bytes of frames between readers and Redis at a time.
        patience_s: how long to retry while Redis is away before a job is given up.
    """

    def __init__(
        self,
        queue: JobQueue,
        frames: FrameStore,
        readers: SecondTryReaders,
        metrics: ApiMetrics,
        tracing: Tracing,
        *,
        max_held_bytes: int,
        patience_s: float,
    ) -> None:
        self._queue = queue
        self._frames = frames
        self._readers = readers
        self._metrics = metrics
        self._tracing = tracing
        self._patience_s = patience_s
        self._in_hand = FairBudget(max_held_bytes)
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by job id
        self._readings: dict[str, Reading] = {}  # by job id, too
        self._reads: dict[str, _SharedRead] = {}  # by frames digest

    def start(self, reading: Reading) -> None:
        """Takes over the reading's place and video, even if it fails."""
        job_id = reading.request.job_id
        task = asyncio.create_task(self._run(reading))
        self._tasks[job_id] = task
        self._readings[job_id] = reading
        self._metrics.set_frame_readings(len(self._tasks))
        task.add_done_callback(lambda _: self._forget(job_id))
        reading.place.when_lost(lambda: self.cancel(job_id))

    def has(self, job_id: str) -> bool:
        return job_id in self._tasks

    def cancel(self, job_id: str) -> None:
        """Stops a reading and kills its reader. The caller ends the job's record."""
        task = self._tasks.get(job_id)
        if task is not None:
            task.cancel()

    async def wait_until_none(self) -> None:
        while self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    async def aclose(self) -> None:
        """Stops all readings and leaves their jobs to other APIs."""
        tasks, readings = list(self._tasks.values()), list(self._readings.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for reading in readings:
            await reading.place.abandon()

    def _forget(self, job_id: str) -> None:
        del self._tasks[job_id], self._readings[job_id]
        self._metrics.set_frame_readings(len(self._tasks))

    async def _run(self, reading: Reading) -> None:
        job_id = reading.request.job_id
        try:
            if reading.wanted is not None:
                request = await self._with_frames(reading, reading.wanted)
            else:
                request = reading.request
            if await self._persist(lambda: self._queue.enqueue(request)):
                logger.info("job queued", extra=request.log_fields)
        except DycokeError as error:
            await self._fail(reading, ErrorEvent.of(error, job_id))
        except Exception as error:  # isolates the job
            incident = log_incident(error, job_id=job_id)
            await self._fail(
                reading,
                ErrorEvent(
                    code=INTERNAL_ERROR,
                    message=incident_message(incident),
                    retryable=False,
                    job_id=job_id,
                ),
            )
        finally:
            if reading.wanted is not None:
                reading.wanted.video.release()
            await reading.place.stop_renewing()

    async def _with_frames(self, reading: Reading, wanted: WantedFrames) -> JobRequest:
        """Ensures that a job's frames are stored; returns its request with their description."""
        began_at, began_at_s = time.monotonic(), time.time()
        request = reading.request
        digest = wanted.digest
        stored = reading.found or await self._persist(
            lambda: self._frames.pin_or_reserve(
                digest,
                request.job_id,
                cached_video(wanted.video_id, request.cache_salt),
                num_bytes=wanted.max_bytes,
            )
        )
        if stored is not None:
            frames = stored
        else:
            frames, digest = await self._read(reading, wanted, digest)
        ready = with_frames(
            request,
            wanted.spec,
            digest,
            frames,
            is_cached=stored is not None,
            read_s=time.monotonic() - began_at,
        )
        self._tracing.record("read frames", request.traceparent, start_s=began_at_s)
        return ready

    async def _read(
        self, reading: Reading, wanted: WantedFrames, digest: str
    ) -> tuple[FramesHeader, str]:
        """Reads the frames, or waits for another job's read of them, and stores them.

        Returns:
            What they are, and the digest that they are stored under: the job's own where others
            should not find them.
        """
        job_id = reading.request.job_id
        shared_digest = digest
        read = self._reads.setdefault(digest, _SharedRead(reading.request.owner))
        if read.task is None:
            read.task = asyncio.create_task(
                self._read_video(wanted, read, timeout_s=reading.read_timeout_s)
            )
        read.num_waiting += 1
        try:
            await self._report(job_id, read.progress)
            async with self._reporting_progress(job_id, read):
                frames = await asyncio.shield(read.task)
            if frames.is_own:
                digest = own_digest(digest, job_id)
            video = cached_video(wanted.video_id, reading.request.cache_salt)
            await self._persist(lambda: self._store(frames, read, digest, job_id, video))
            return frames.header, digest
        finally:
            read.num_waiting -= 1
            if read.num_waiting == 0:
                read.task.cancel()
                if self._reads.get(shared_digest) is read:
                    del self._reads[shared_digest]
                self._in_hand.give_back(read.held_bytes, read.owner)

    async def _store(
        self, frames: _ReadFrames, read: _SharedRead, digest: str, job_id: str, video: str
    ) -> None:
        """Stores frames, unless another job that has waited for them has done so. Raises what
        `FrameStore` does, also where the others are not through in time.
        """
        try:
            async with asyncio.timeout(self._patience_s + CALL_TIMEOUT_S):
                await read.storing.acquire()
        except TimeoutError:
            raise StoreUnavailableError from None
        try:
            if await self._frames.pin(digest, job_id) is None:
                await self._frames.put_and_pin(digest, frames.blob, job_id, video)
        finally:
            read.storing.release()

    async def _read_video(
        self, wanted: WantedFrames, read: _SharedRead, *, timeout_s: float
    ) -> _ReadFrames:
        def on_progress(progress: float) -> None:
            read.progress = progress

        num_bytes = wanted.max_bytes
        await self._in_hand.take(num_bytes, read.owner)
        read.held_bytes = num_bytes
        frames = await self._readers.read(
            wanted.video.path,
            wanted.spec,
            owner=read.owner,
            on_progress=on_progress,
            timeout_s=timeout_s,
        )
        blob = await asyncio.to_thread(encode_frames, frames)
        return _ReadFrames(header_of(frames), blob, is_own=fell_back_after_kill(frames))

    @asynccontextmanager
    async def _reporting_progress(self, job_id: str, read: _SharedRead) -> AsyncIterator[None]:
        task = asyncio.create_task(self._report_progress(job_id, read))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _report_progress(self, job_id: str, read: _SharedRead) -> None:
        reported = 0.0
        while True:
            await asyncio.sleep(PROGRESS_S)
            if read.progress != reported:
                reported = read.progress
                await self._report(job_id, reported)

    async def _report(self, job_id: str, progress: float) -> None:
        with suppress(StoreUnavailableError):
            status = StatusEvent(stage="reading_frames", progress=progress)
            await self._queue.append_status(job_id, status)

    async def _fail(self, reading: Reading, event: ErrorEvent) -> None:
        """Ends the job. If Redis stays down, a sweep ends it when its place runs out."""
        logger.info("reading failed", extra={"job_id": event.job_id, "code": event.code})
        with suppress(StoreUnavailableError, JobNotFoundError):
            await self._persist(
                lambda: self._queue.end(event.job_id, JobState.ERROR, event, reader=reading.reader)
            )

    async def _persist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Calls the store until it answers, for at most `patience_s`."""
        give_up_at = time.monotonic() + self._patience_s
        while True:
            try:
                return await call()
            except StoreUnavailableError:
                if time.monotonic() > give_up_at:
                    raise
            await asyncio.sleep(RETRY_S)
