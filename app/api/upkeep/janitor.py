"""The background work of every API process: it ends jobs that nothing else ends, adopts jobs whose
reader is gone, keeps the video store within its budget and free of expired videos, measures the
queue and the event loop's lag for the metrics, and forgets what is counted but gone.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from app.api.auth import ApiKeys
from app.api.post.orphans import Orphans
from app.api.post.uploads import Uploads
from app.errors import StoreUnavailableError
from app.metrics import ApiMetrics
from app.store.job_queue import JobQueue
from app.store.worker_registry import WorkerRegistry
from app.video_store import VideoStore

logger = logging.getLogger(__name__)

SWEEP_S = 1.0
TIDY_S = 60.0
EXPIRY_S = 30.0  # expired videos are not found any more: this is when their bytes go
LAG_S = 0.1  # a stall of the event loop that is shorter is seen by chance, a longer one always


class Janitor:
    def __init__(
        self,
        queue: JobQueue,
        registry: WorkerRegistry,
        videos: VideoStore,
        uploads: Uploads,
        orphans: Orphans,
        keys: ApiKeys,
        metrics: ApiMetrics,
    ) -> None:
        self._queue = queue
        self._registry = registry
        self._videos = videos
        self._uploads = uploads
        self._orphans = orphans
        self._keys = keys
        self._metrics = metrics
        self._known_models: set[str] = set()  # their gauges fall to 0, they do not vanish

    async def run(self) -> None:
        """Works until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_every(SWEEP_S, self._sweep))
            tasks.create_task(_every(SWEEP_S, self._look))
            tasks.create_task(_every(TIDY_S, self._videos.tidy))
            tasks.create_task(_every(TIDY_S, self._prune))
            tasks.create_task(_every(EXPIRY_S, self._uploads.expire))
            tasks.create_task(self._watch_loop_lag())

    async def _sweep(self) -> None:
        swept = await self._queue.sweep()
        for job_id in swept.overdue:
            logger.warning("job swept", extra={"job_id": job_id, "reason": "deadline"})
        for orphan in swept.orphans:
            await self._orphans.adopt(orphan)

    async def _prune(self) -> None:
        await self._queue.prune([holder.owner for holder in self._keys.holders])

    async def _look(self) -> None:
        try:
            await self._look_at_queues()
            await self._look_at_keys()
        except StoreUnavailableError:
            self._metrics.set_store_up(False)
            raise
        self._metrics.set_store_up(True)

    async def _look_at_queues(self) -> None:
        cards = await self._registry.cards()
        self._known_models.update(card.model for card in cards)
        for model in self._known_models:
            depth = await self._queue.depth(model)
            self._metrics.set_queue(
                model,
                depth=depth.waiting,
                places=depth.places,
                oldest_age_s=depth.oldest_age_s or 0.0,
                num_workers=sum(card.model == model for card in cards),
            )

    async def _look_at_keys(self) -> None:
        """Revoked ones too: their jobs continue. A name may have had several holders."""
        holders = self._keys.holders
        counts = await self._queue.num_jobs([holder.owner for holder in holders])
        waiting, running = Counter[str](), Counter[str]()
        for holder, (num_waiting, num_running) in zip(holders, counts, strict=True):
            label = self._metrics.key_label(holder.name)
            waiting[label] += num_waiting
            running[label] += num_running
        for label in waiting:
            self._metrics.set_key_jobs(label, waiting=waiting[label], running=running[label])

    async def _watch_loop_lag(self) -> None:
        """How late a timer is: every stream waits as long, whatever the cause."""
        loop = asyncio.get_running_loop()
        while True:
            due_at = loop.time() + LAG_S
            await asyncio.sleep(LAG_S)
            self._metrics.observe_lag(max(0.0, loop.time() - due_at))


async def _every(period_s: float, work: Callable[[], Awaitable[None]]) -> None:
    """Repeats `work`, whatever becomes of one round. An outage of Redis is logged once."""
    is_out = False
    while True:
        began_at = time.monotonic()
        try:
            await work()
            is_out = False
        except StoreUnavailableError as error:
            if not is_out:
                logger.warning("%s", error.message)
            is_out = True
        except Exception:  # this task must outlive any error
            logger.exception("a round of the janitor failed")
        await asyncio.sleep(max(0.0, began_at + period_s - time.monotonic()))
