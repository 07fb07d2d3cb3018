"""One worker: an engine on its thread, and the tasks that connect it to the queue.

It runs until asked to stop, then drains: it takes nothing new, finishes the jobs that it can finish
in time, and hands the rest back for other workers to resume. If a part of it fails, it hands back
the jobs in its engine as suspects, and the others at no cost, and reports failure.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

from redis.asyncio import Redis

from app.errors import StoreUnavailableError
from app.messages import FrameLimits, FrameRate, ModelCard
from app.metrics import WorkerMetrics
from app.settings import Settings
from app.store.forgotten_videos import ForgottenVideos
from app.store.frame_store import FrameStore
from app.store.job_leases import JobLeases
from app.store.kept_sets import KeptSets
from app.store.keys import RedisKeys
from app.store.worker_registry import WorkerRegistry
from app.tracing import Tracing
from app.worker.engine_thread import EngineThread, Update
from app.worker.frame_loader import FrameLoader
from app.worker.job_taker import JobTaker
from app.worker.lease_keeper import LeaseKeeper
from app.worker.publisher import Publisher
from app.worker.running_jobs import RunningJobs
from dycoke_core.engine_card import EngineCard

if TYPE_CHECKING:
    from dycoke_core.engine import Engine

FLUSH_TIMEOUT_S = 2.0  # for the last events of a worker that ends
STORE_TIMEOUT_S = 5.0  # for withdrawing and handing back
ENGINE_STOP_TIMEOUT_S = 10.0
MAX_STEP_S = 120.0  # longer than any step: the device hangs, so jobs resume elsewhere

logger = logging.getLogger(__name__)

Task = asyncio.Task[Any]


class Worker:
    """Args:
    worker_id: unique to this process, also among its earlier lives.
    """

    def __init__(
        self,
        settings: Settings,
        redis: Redis,
        make_engine: "Callable[[], Engine]",
        metrics: WorkerMetrics,
        *,
        worker_id: str,
        tracing: Tracing | None = None,
    ) -> None:
        keys = RedisKeys(settings.redis_prefix)
        self._settings = settings
        self._worker_id = worker_id
        self._metrics = metrics
        self._is_stopped = asyncio.Event()
        self._leases = JobLeases(
            redis,
            keys,
            model=settings.model_name,
            worker_id=worker_id,
            result_ttl_s=settings.result_ttl_s,
        )
        self._registry = WorkerRegistry(redis, keys)
        self._forgotten = ForgottenVideos(redis, keys)
        self._engine = EngineThread(make_engine)
        self._jobs = RunningJobs(self._engine.abort)
        self._publisher = Publisher(
            self._leases, self._jobs, metrics, tracing or Tracing(), KeptSets(redis, keys)
        )
        self._frames = FrameLoader(
            FrameStore(redis, keys, max_bytes=settings.max_frame_store_bytes),
            self._engine,
            self._publisher,
            self._jobs,
        )
        self._engine.start(self._take_update)
        self._job_taker = JobTaker(
            self._leases,
            self._frames,
            self._engine,
            self._publisher,
            self._jobs,
            metrics,
            lease_s=settings.lease_s,
        )

    def stop(self) -> None:
        """Begins the drain."""
        self._is_stopped.set()

    async def run(self) -> bool:
        """Returns True after a drain, False when a part failed and the process must end.

        Raises:
            ModelLoadError: and whatever else loading the engine raised.
        """
        async with _Tasks() as tasks:
            is_stopped = tasks.start(self._is_stopped.wait())
            card = tasks.start(self._engine.card())
            await tasks.first_of(is_stopped, card)
            if not card.done():
                return True
            return await self._serve(self._model_card(card.result()), is_stopped, tasks)

    def _take_update(self, update: Update) -> None:
        self._publisher.publish(update)
        self._frames.load_again(update.wants_frames)

    def close(self) -> bool:
        """Ends the engine's thread. False if it hangs: then only the process's end ends it."""
        return self._engine.stop(timeout_s=ENGINE_STOP_TIMEOUT_S)

    async def _serve(self, card: ModelCard, is_stopped: Task, tasks: "_Tasks") -> bool:
        self._jobs.max_jobs = card.max_running_jobs
        keeper = LeaseKeeper(
            self._leases,
            self._registry,
            self._engine,
            self._publisher,
            self._jobs,
            self._forgotten,
            card,
            lease_s=self._settings.lease_s,
            max_step_s=min(MAX_STEP_S, self._settings.job_timeout_s),
        )
        taking = tasks.start(self._job_taker.run())
        publisher = tasks.start(self._publisher.run())
        services = [
            publisher,
            tasks.start(keeper.run()),
            tasks.start(keeper.listen()),
            tasks.start(self._engine.wait_for_failure()),
        ]
        logger.info("ready", extra={"model": card.model, "device": card.device})
        self._metrics.set_capacity(running_jobs=card.max_running_jobs)
        has_failed = False
        try:
            await tasks.first_of(is_stopped, taking, *services)
            logger.info("draining", extra={"running_jobs": len(self._jobs)})
            self._job_taker.stop()
            self._metrics.set_capacity(running_jobs=0)
            await tasks.first_of(tasks.start(self._finish_jobs(keeper, taking)), *services)
        except Exception:
            logger.exception("a part of the worker failed")
            has_failed = True
        await self._hand_back(taking, publisher, has_failed=has_failed)
        with suppress(StoreUnavailableError, TimeoutError):
            async with asyncio.timeout(STORE_TIMEOUT_S):
                await keeper.withdraw()
        return not has_failed

    async def _finish_jobs(self, keeper: LeaseKeeper, taking: Task) -> None:
        """Waits for the running jobs, at most as long as a drain may take."""
        with suppress(StoreUnavailableError):
            await keeper.withdraw()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_timeout_s):
                await asyncio.wait([taking])
                while len(self._jobs):
                    await self._jobs.wait_for_change(timeout_s=1.0)

    async def _hand_back(self, taking: Task, publisher: Task, *, has_failed: bool) -> None:
        """Gives up the jobs that are left, after publishing what the engine has made of them."""
        self._job_taker.stop()
        await asyncio.wait([taking], timeout=STORE_TIMEOUT_S)
        for job in self._jobs:
            self._engine.abort(job.sequence_id)
        self._publisher.close()
        await asyncio.wait([publisher], timeout=FLUSH_TIMEOUT_S)
        left = [(job.delivery, has_failed and job.is_in_engine) for job in self._jobs]
        crew = sum(was_in_engine for _, was_in_engine in left)
        for job in self._jobs:
            self._jobs.drop(job)
        try:
            async with asyncio.timeout(STORE_TIMEOUT_S):
                for delivery, was_in_engine in left:
                    await self._leases.hand_back(
                        delivery,
                        lease_s=self._settings.lease_s,
                        crew=crew if was_in_engine else 0,
                    )
                    logger.info("job handed back", extra=delivery.request.log_fields)
        except (StoreUnavailableError, TimeoutError):
            logger.warning("the job store is away; leases are left to run out")

    def _model_card(self, card: EngineCard) -> ModelCard:
        return ModelCard(
            worker_id=self._worker_id,
            model=self._settings.model_name,
            weights_digest=card.weights_digest,
            device=card.device,
            dtype=card.dtype,
            image_size=card.image_size,
            frame_limits=_frame_limits(card),
            frame_spread=card.frame_spread,
            frame_rate=_frame_rate(card),
            frame_resizing=card.frame_resizing,
            tokens_per_frame=card.tokens_per_frame,
            frames_per_unit=card.frames_per_unit,
            max_words_per_token=card.max_words_per_token,
            num_layers=card.num_layers,
            max_model_tokens=card.max_model_tokens,
            prefill_chunk_tokens=card.prefill_chunk_tokens,
            sampler_version=card.sampler_version,
            max_running_jobs=card.max_running_sequences,
            running_jobs=0,
        )


def _frame_rate(card: EngineCard) -> FrameRate | None:
    return None if card.frame_rate is None else FrameRate(**asdict(card.frame_rate))


def _frame_limits(card: EngineCard) -> FrameLimits | None:
    return None if card.frame_limits is None else FrameLimits(**asdict(card.frame_limits))


class _Tasks:
    """Tasks that have all ended when the block is left."""

    def __init__(self) -> None:
        self._tasks: list[Task] = []

    def start(self, work: Coroutine[Any, Any, Any]) -> Task:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    async def first_of(self, *tasks: Task) -> None:
        """Waits until one is done, and raises its exception if there is one."""
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
