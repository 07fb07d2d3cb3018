"""Takes jobs while there is room and prepares them for the engine.

A worker takes handed-back and abandoned jobs before fresh ones. While it has a suspect it takes
nothing else: a suspect has the engine to itself until it is cleared, so a job that kills workers
takes no other job along. Jobs that were there before the suspect have `MAX_COMPANY_S` to end, and
are then handed back. Idle workers get some time to take suspects before busy ones do; `probation`
decides which suspect is next.

Waits: for a job, at most `poll_s` at a time; for room, likewise; for frames, until the job's
deadline (`app.worker.lease_keeper` ends the wait).
"""

import asyncio
import logging
import time

from app.errors import (
    DeadlineExceededError,
    SamplerChangedError,
    StoreUnavailableError,
)
from app.metrics import WorkerMetrics
from app.store.client import RETRY_AFTER_S
from app.store.job_leases import Delivery, JobLeases
from app.worker.clock_check import ClockCheck
from app.worker.engine_thread import EngineThread
from app.worker.entrance import Entrance
from app.worker.frame_loader import FrameLoader
from app.worker.probation import MayRun, Probation
from app.worker.publisher import Publisher
from app.worker.running_jobs import RunningJob, RunningJobs
from dycoke_core.errors import DycokeError, EngineError
from dycoke_core.frame_content import content_of
from dycoke_core.sequence import (
    SAMPLER_VERSION,
    ChatMessage,
    FrameTiming,
    SamplingParams,
    Sequence,
)

MAX_POLL_S = 1.0
MAX_COMPANY_S = 5.0  # how long a suspect waits for the other jobs to end

logger = logging.getLogger(__name__)


class JobTaker:
    def __init__(
        self,
        leases: JobLeases,
        frames: FrameLoader,
        engine: EngineThread,
        publisher: Publisher,
        jobs: RunningJobs,
        metrics: WorkerMetrics,
        *,
        lease_s: float,
    ) -> None:
        self._leases = leases
        self._frames = frames
        self._engine = engine
        self._publisher = publisher
        self._jobs = jobs
        self._metrics = metrics
        self._lease_s = lease_s
        self._poll_s = min(MAX_POLL_S, lease_s / 3)
        self._take_over_from = 0.0  # on the monotonic clock
        self._probation = Probation()
        self._clock = ClockCheck()
        self._entrance = Entrance(leases, engine, publisher, jobs, metrics)
        self._is_stopping = False

    def stop(self) -> None:
        """Lets `run` return within one poll, after giving back what it took meanwhile."""
        self._is_stopping = True

    async def run(self) -> None:
        has_group = False
        while not self._is_stopping:
            try:
                if not has_group:
                    await self._leases.ensure_group()
                    has_group = True
                await self._take_one()
            except StoreUnavailableError:
                # Holders of leases could not renew them either: give them time to do so.
                self._take_over_from = time.monotonic() + self._lease_s
                await asyncio.sleep(RETRY_AFTER_S)

    async def _take_one(self) -> None:
        if not self._jobs.has_room or self._jobs.has_suspect:
            await self._jobs.wait_for_change(self._poll_s)
            return
        delivery = await self._take_over()
        if delivery is None and self._probation.who(time.monotonic()) is MayRun.SUSPECTS:
            self._probation.none_waits()
            return
        if delivery is None:
            delivery = await self._leases.take(block_s=self._poll_s)
        if delivery is None and not len(self._jobs):
            self._probation.none_waits()
        if delivery is None:
            return
        if self._is_stopping:
            await self._leases.hand_back(delivery, lease_s=self._lease_s)
        else:
            self._start(delivery)

    async def _take_over(self) -> Delivery | None:
        now = time.monotonic()
        may_run = self._probation.who(now)
        if now < self._take_over_from and may_run is not MayRun.SUSPECTS:
            return None
        leaves_to_idle = may_run is MayRun.ANY and len(self._jobs) > 0
        delivery = await self._leases.take_over(
            lease_s=self._lease_s,
            may_be_suspect=may_run is not MayRun.OTHERS,
            must_be_suspect=may_run is MayRun.SUSPECTS,
            suspect_idle_s=self._lease_s + 2 * self._poll_s if leaves_to_idle else 0.0,
        )
        if delivery is None:
            self._take_over_from = now + self._poll_s
            return None
        if not delivery.was_set_aside:
            self._metrics.count_reclaim()
        return delivery

    def _start(self, delivery: Delivery) -> None:
        self._clock.note(delivery.started_at_s)
        if earlier := self._jobs.get(delivery.job_id):
            self._jobs.drop(earlier)  # our own lease ran out, and this is the job's next attempt
        logger.info(
            "job taken",
            extra={
                **delivery.request.log_fields,
                "attempt": delivery.attempt,
                "num_published_tokens": len(delivery.published_token_ids),
                "is_suspect": delivery.is_suspect,
            },
        )
        job = RunningJob.of(delivery)
        self._jobs.add(job)
        self._entrance.note_taken(job)
        job.loading = asyncio.create_task(self._load(job))
        job.loading.add_done_callback(lambda loading: self._entrance.note_left(job))

    async def _load(self, job: RunningJob) -> None:
        """Isolates one job: an error here fails only this job."""
        try:
            if time.time() > job.deadline_at_s:
                raise DeadlineExceededError
            sequence = await self._make_sequence(job)
            await self._look_at_frames(sequence)
            await self._entrance.add(job, sequence)
        except DycokeError as error:
            self._publisher.fail(job, error)
        except Exception:
            logger.exception("a job could not be prepared", extra=job.log_fields)
            self._publisher.fail(
                job, EngineError("the worker failed to prepare this request: post it again")
            )

    async def _make_sequence(self, job: RunningJob) -> Sequence:
        request, frames = job.delivery.request, job.delivery.request.frames
        if frames is None and request.video_id is not None:
            raise EngineError("the request has no frames: post it again")
        _check_sampler(job.delivery)
        video = None if frames is None else await self._frames.load(frames.digest)
        if job.is_suspect:
            await self._make_room_for(job)
        await self._enter(job)
        return Sequence(
            sequence_id=job.sequence_id,
            messages=tuple(ChatMessage(turn.role, turn.content) for turn in request.messages),
            frames=None if video is None else video.pixels,
            timing=None
            if video is None
            else FrameTiming.shown_at(video.timestamps_s, video.shown_s),
            sampling=SamplingParams(
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
                stop=tuple(request.stop),
                ignore_eos=request.ignore_eos,
            ),
            forced_token_ids=job.delivery.published_token_ids,
            # The two readers' pixels differ a little, and the digest does not name the reader.
            video_key=None if frames is None else f"{frames.digest}:{frames.reader}",
            video_turn=request.video_turn,
            video_name=request.cached_video,
            wants_kept_sets=request.kept_mask,
            priority=request.priority,
            can_reload_frames=video is not None,
        )

    async def _look_at_frames(self, sequence: Sequence) -> None:
        """Runs on another thread than the engine's, so that its steps do not wait."""
        if sequence.frames is not None:
            card = await self._engine.card()
            await asyncio.to_thread(content_of, sequence, card.frames_per_unit)

    async def _make_room_for(self, suspect: RunningJob) -> None:
        """Waits until a suspect has the engine to itself. Those that were tried before it go at
        once; they are cleared, and resume when it is their turn.
        """
        is_next = self._probation.who(time.monotonic()) is MayRun.SUSPECTS
        if not await self._jobs.wait_until_alone(0.0 if is_next else MAX_COMPANY_S):
            for job in self._jobs:
                if job is not suspect and job.final is None:
                    await self._set_aside(job)
            await self._jobs.wait_until_alone()
        self._probation.begin_probation(time.monotonic())

    async def _set_aside(self, job: RunningJob) -> None:
        """Gives up a job that any worker may resume; it is not charged."""
        while self._jobs.get(job.job_id) is job:
            try:
                await self._leases.hand_back(job.delivery, lease_s=self._lease_s, is_set_aside=True)
            except StoreUnavailableError:
                await asyncio.sleep(RETRY_AFTER_S)
            else:
                self._jobs.drop(job)

    async def _enter(self, job: RunningJob) -> None:
        """Notes in Redis that the job goes to the engine, in case this process dies without
        reporting. A job that is no longer ours is dropped.
        """
        job.is_in_engine = True
        while True:
            try:
                is_ours = await self._leases.enter(job.delivery)
            except StoreUnavailableError:
                await asyncio.sleep(RETRY_AFTER_S)
                continue
            if not is_ours:
                self._jobs.drop(job)  # cancels this task
                await asyncio.sleep(0)
            return


def _check_sampler(delivery: Delivery) -> None:
    """Refuses to resume an answer whose tokens another version of the sampler has drawn.

    A greedy answer does not depend on the version, and one without published tokens may begin under
    any.
    """
    is_drawn = delivery.request.temperature > 0.0
    if is_drawn and delivery.sampler_version not in (None, SAMPLER_VERSION):
        raise SamplerChangedError(
            "the service was upgraded while it was answering, and draws other tokens from a seed "
            "now: ask again"
        )
