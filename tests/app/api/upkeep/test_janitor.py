"""What an API does in the background, round after round, whatever becomes of one of them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from app.api.auth import ApiKeys
from app.api.post.orphans import Orphans
from app.api.post.uploads import Uploads
from app.api.upkeep import janitor
from app.api.upkeep.janitor import Janitor
from app.errors import StoreUnavailableError
from app.keys.entries import ANONYMOUS, Principal
from app.messages import JobState
from app.metrics import ApiMetrics
from app.store.job_leases import JobLeases
from app.store.job_queue import JobQueue, Orphan
from app.store.keys import RedisKeys
from app.store.worker_registry import WorkerRegistry
from app.video_store import VideoStore
from tests.app.api.post.accepted import accepted
from tests.cards import model_card
from tests.integration.jobs import MODEL, start, submit

PATIENCE_S = 30.0


class Rounds:
    """Counts the rounds of some work, and fails in those that a test names."""

    def __init__(self) -> None:
        self.count = 0
        self.failures: list[Exception] = []

    async def __call__(self) -> None:
        self.count += 1
        if self.failures:
            raise self.failures.pop(0)


class Adopting:
    def __init__(self) -> None:
        self.adopted: list[Orphan] = []

    async def adopt(self, orphan: Orphan) -> None:
        self.adopted.append(orphan)


class Holders:
    """Keys by their holders; two have had the same name."""

    def __init__(self) -> None:
        self.holders = [Principal(ANONYMOUS, "everybody"), Principal("old", "everybody")]


class Service:
    def __init__(self, queue: JobQueue, registry: WorkerRegistry) -> None:
        self.queue, self.workers = queue, registry
        self.registry = CollectorRegistry()
        self.tidy, self.expire, self.orphans = Rounds(), Rounds(), Adopting()

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Within the block the janitor works."""
        task = asyncio.create_task(
            Janitor(
                self.queue,
                self.workers,
                cast(VideoStore, self),
                cast(Uploads, self),
                cast(Orphans, self.orphans),
                cast(ApiKeys, Holders()),
                ApiMetrics(self.registry),
            ).run()
        )
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"dycoke_{name}", labels)


@pytest.fixture
def service(
    queue: JobQueue, redis: Redis, keys: RedisKeys, monkeypatch: pytest.MonkeyPatch
) -> Service:
    for period in ("SWEEP_S", "TIDY_S", "EXPIRY_S", "LAG_S"):
        monkeypatch.setattr(janitor, period, 0.005)
    return Service(queue, WorkerRegistry(redis, keys))


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


async def test_queues_and_keys_are_shown_as_they_are(
    service: Service, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    for job_id in ("a", "b", "c"):
        await submit(service.queue, job_id)
    await start(leases)
    await service.workers.publish(model_card("w", model=MODEL), 60)
    async with service.kept():
        await until(lambda: service.value("key_jobs", key="everybody", state="running") == 1)
        assert service.value("key_jobs", key="everybody", state="waiting") == 2
        await until(lambda: service.value("workers_alive", model=MODEL) == 1)
        assert service.value("queue_depth", model=MODEL) == 2
        assert service.value("store_up") == 1
        await service.workers.withdraw("w")
        await until(lambda: service.value("workers_alive", model=MODEL) == 0)
        assert service.value("queue_depth", model=MODEL) == 2, "its gauges do not vanish"


async def test_jobs_past_their_deadline_are_ended_and_orphans_offered(service: Service) -> None:
    await submit(service.queue, "late", timeout_s=-1.0)
    await (await accepted(service.queue, None, "orphan")).place.abandon()
    async with service.kept():
        await until(lambda: service.orphans.adopted)
    assert service.orphans.adopted[0] == Orphan(MODEL, "orphan")
    assert (await service.queue.get("late")).state is JobState.ERROR


async def test_a_round_that_fails_is_not_the_last(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.tidy.failures = [RuntimeError("a bug"), OSError("a disk")]
    with caplog.at_level(logging.ERROR):
        async with service.kept():
            await until(lambda: service.tidy.count > 3 and service.expire.count > 3)
    failed = [record for record in caplog.records if "round of the janitor" in record.message]
    assert len(failed) == 2


async def test_an_outage_is_told_once_until_it_is_over(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    away = StoreUnavailableError("Redis is away")
    service.expire.failures = [away] * 4
    with caplog.at_level(logging.WARNING):
        async with service.kept():
            await until(lambda: service.expire.count > 5)
            service.expire.failures = [away] * 3
            await until(lambda: not service.expire.failures)
    assert [record.message for record in caplog.records].count("Redis is away") == 2


async def test_without_redis_the_store_is_shown_as_down(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise StoreUnavailableError("Redis is away")

    cards = service.workers.cards
    monkeypatch.setattr(service.workers, "cards", fail)
    async with service.kept():
        await until(lambda: service.value("store_up") == 0)
        monkeypatch.setattr(service.workers, "cards", cards)
        await until(lambda: service.value("store_up") == 1)


async def test_the_loops_lag_is_sampled(service: Service) -> None:
    async with service.kept():
        await until(lambda: (service.value("event_loop_lag_seconds_count") or 0) > 3)
    assert (service.value("event_loop_lag_seconds_sum") or 0) >= 0
