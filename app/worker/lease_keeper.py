"""Keeps what a worker holds: renews leases and the worker's card, enforces deadlines, listens for
jobs that others end, and checks that the engine makes progress.

Renewing reports every job that was lost; the channel reports it immediately.
"""

import asyncio
import logging
import time
from contextlib import aclosing

from app.errors import DeadlineExceededError, StoreUnavailableError
from app.messages import ModelCard
from app.store.client import RETRY_AFTER_S
from app.store.forgotten_videos import ForgottenVideos
from app.store.job_leases import JobLeases
from app.store.worker_registry import WorkerRegistry
from app.worker.engine_thread import EngineThread
from app.worker.publisher import Publisher
from app.worker.running_jobs import RunningJobs
from dycoke_core.errors import EngineError

MAX_TICK_S = 1.0

logger = logging.getLogger(__name__)


class LeaseKeeper:
    """Args:
    card: what this worker serves; withdrawn by the caller that stops it.
    max_step_s: a single engine step that takes longer means that the device hangs.
    """

    def __init__(
        self,
        leases: JobLeases,
        registry: WorkerRegistry,
        engine: EngineThread,
        publisher: Publisher,
        jobs: RunningJobs,
        forgotten: ForgottenVideos,
        card: ModelCard,
        *,
        lease_s: float,
        max_step_s: float,
    ) -> None:
        self._leases = leases
        self._registry = registry
        self._engine = engine
        self._publisher = publisher
        self._jobs = jobs
        self._forgotten = forgotten
        self._card: ModelCard | None = card
        self._lease_s = lease_s
        self._tick_s = min(MAX_TICK_S, lease_s / 3)
        self._max_step_s = max_step_s
        self._is_store_away = False

    async def withdraw(self) -> None:
        """Tells the APIs that this worker takes no more jobs."""
        card, self._card = self._card, None
        if card is not None:
            await self._registry.withdraw(card.worker_id)

    async def run(self) -> None:
        """Raises EngineError: the engine hangs."""
        while True:
            if self._engine.step_age_s() > self._max_step_s:
                raise EngineError("the worker's engine hangs in a step: post the request again")
            self._enforce_deadlines()
            try:
                await self._renew()
                await self._forget_videos()
                await self._publish_card()
                self._note_store(is_away=False)
            except StoreUnavailableError:
                self._note_store(is_away=True)
            await asyncio.sleep(self._tick_s)

    async def listen(self) -> None:
        """Drops jobs that are cancelled or ended by others, as soon as that happens."""
        while True:
            try:
                async with aclosing(self._leases.ended()) as ended:
                    async for job_id in ended:
                        if job_id is not None and (job := self._jobs.get(job_id)):
                            self._jobs.drop(job)
            except StoreUnavailableError:
                await asyncio.sleep(RETRY_AFTER_S)

    def _note_store(self, *, is_away: bool) -> None:
        if is_away and not self._is_store_away:
            logger.warning(
                "the job store is away; the engine keeps running",
                extra={"running_jobs": len(self._jobs)},
            )
        elif self._is_store_away and not is_away:
            logger.info("the job store is back")
        self._is_store_away = is_away

    def _enforce_deadlines(self) -> None:
        now_s = time.time()
        for job in self._jobs:
            if job.final is None and now_s > job.deadline_at_s:
                self._publisher.fail(job, DeadlineExceededError())
                self._jobs.stop(job)

    async def _renew(self) -> None:
        jobs = list(self._jobs)
        if not jobs:
            return
        kept = await self._leases.renew([job.delivery for job in jobs])
        for job, is_kept in zip(jobs, kept, strict=True):
            # A job with a final event may just have ended by it.
            if not is_kept and job.final is None:
                self._jobs.drop(job)

    async def _forget_videos(self) -> None:
        for video in await self._forgotten.news():
            self._engine.forget_video(video)

    async def _publish_card(self) -> None:
        if self._card is not None:
            card = self._card.model_copy(update={"running_jobs": len(self._jobs)})
            await self._registry.publish(card, ttl_s=self._lease_s)
