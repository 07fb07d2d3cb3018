"""Fetches jobs' frames from the store: before the engine gets a job, and when it asks again.

A job's blob stays in the store while the job lives (`app.store.frame_store`), so a worker keeps the
pixels no longer than its engine needs them. A preempted sequence may need them again: it waits in
the engine without holding up others.

While Redis is down, this waits until the job's deadline (`app.worker.lease_keeper` ends the wait).
"""

import asyncio
import logging
from collections.abc import Iterable

from app.errors import StoreUnavailableError
from app.store.client import RETRY_AFTER_S
from app.store.frame_store import FrameStore, decode_frames
from app.worker.engine_thread import EngineThread
from app.worker.publisher import Publisher
from app.worker.running_jobs import RunningJob, RunningJobs
from dycoke_core.errors import DycokeError, EngineError
from dycoke_core.video import VideoFrames

logger = logging.getLogger(__name__)


class FrameLoader:
    def __init__(
        self, store: FrameStore, engine: EngineThread, publisher: Publisher, jobs: RunningJobs
    ) -> None:
        self._store = store
        self._engine = engine
        self._publisher = publisher
        self._jobs = jobs

    async def load(self, digest: str) -> VideoFrames:
        """Raises StoreUnavailableError: the frames are not stored any more."""
        while True:
            try:
                blob = await self._store.get(digest)
            except StoreUnavailableError:
                await asyncio.sleep(RETRY_AFTER_S)
                continue
            if blob is None:
                raise StoreUnavailableError(
                    "the frames of this request are no longer stored: post it again"
                )
            return decode_frames(blob)

    def load_again(self, sequence_ids: Iterable[str]) -> None:
        """Fetches the frames that these sequences wait for, or ends their jobs."""
        for sequence_id in sequence_ids:
            job = self._jobs.of_sequence(sequence_id)
            if job is not None and job.final is None:
                job.loading = asyncio.create_task(self._load_again(job))

    async def _load_again(self, job: RunningJob) -> None:
        """Isolates one job: an error here fails only this job."""
        logger.info("frames are fetched again", extra=job.log_fields)
        try:
            frames = job.delivery.request.frames
            assert frames is not None
            video = await self.load(frames.digest)
            await self._engine.give_frames(job.sequence_id, video.pixels)
        except DycokeError as error:
            self._fail(job, error)
        except Exception:
            logger.exception("frames could not be fetched again", extra=job.log_fields)
            self._fail(
                job,
                EngineError("the worker failed to fetch the frames of this request: post it again"),
            )

    def _fail(self, job: RunningJob, error: DycokeError) -> None:
        self._publisher.fail(job, error)
        self._engine.abort(job.sequence_id)
