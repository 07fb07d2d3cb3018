"""How jobs of policy `auto` and others get into the engine, and what an outage of Redis does."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import cast

import pytest
from prometheus_client import CollectorRegistry

from app.errors import StoreUnavailableError
from app.messages import CompressionChoice
from app.metrics import WorkerMetrics
from app.store.job_leases import Delivery, JobLeases, NotedChoice
from app.store.queue_snapshot import QueueSnapshot
from app.worker.engine_thread import EngineThread
from app.worker.entrance import Entrance
from app.worker.publisher import Publisher
from app.worker.running_jobs import RunningJob, RunningJobs
from dycoke_core.auto import DEFAULT_LADDER, AutoConfig, Reason
from dycoke_core.config import CompressionConfig
from dycoke_core.sequence import Sequence
from tests.app.worker.test_engine_thread import sequence
from tests.app.worker.test_running_jobs import running_job
from tests.integration.api import until
from tests.integration.fake_engine import FakeEngine


class FakeLeases:
    """Notes choices, unless it is away; may lose its replies."""

    def __init__(self) -> None:
        self.is_away = False
        self.loses_replies = False
        self.answers = asyncio.Event()
        self.answers.set()
        self.num_calls = 0
        self.noted: dict[str, CompressionChoice] = {}

    async def choose(self, delivery: Delivery, choice: CompressionChoice) -> NotedChoice:
        self.num_calls += 1
        await self.answers.wait()
        if not self.is_away:
            self.noted.setdefault(delivery.job_id, choice)
        if self.is_away or self.loses_replies:
            raise StoreUnavailableError("away")
        return NotedChoice(self.noted[delivery.job_id], QueueSnapshot())


class FakePublisher:
    def tell_choice(self, job: RunningJob, choice: CompressionChoice) -> None:
        job.take_choice(choice)


def job_of(name: str, compression: AutoConfig | CompressionConfig) -> RunningJob:
    job = running_job(name)
    changed = {"compression": compression.as_dict()}
    request = job.delivery.request.model_copy(update=changed)
    job.delivery = replace(job.delivery, request=request)
    return job


class Door:
    """An entrance to a fake engine, and jobs that come."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.thread = EngineThread(lambda: self.engine)
        self.thread.start(lambda update: None)
        self.leases = FakeLeases()
        self.jobs = RunningJobs(self.thread.abort)
        self.jobs.max_jobs = 10
        self.entrance = Entrance(
            cast(JobLeases, self.leases),
            self.thread,
            cast(Publisher, FakePublisher()),
            self.jobs,
            WorkerMetrics(CollectorRegistry(), model="tiny"),
        )

    async def add(self, name: str, compression: AutoConfig | CompressionConfig) -> Sequence:
        job = job_of(name, compression)
        self.jobs.add(job)
        added = sequence(name)
        async with asyncio.timeout(30):
            await self.entrance.add(job, added)
        return added


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    door = Door()
    yield door
    assert await asyncio.to_thread(door.thread.stop, timeout_s=30)


async def test_nobody_waits_behind_a_choice_that_cannot_be_stored(door: Door) -> None:
    door.leases.is_away = True
    tasks = [asyncio.create_task(door.add(name, AutoConfig())) for name in "ab"]
    await until(lambda: door.leases.num_calls)
    fixed = await door.add("fixed", DEFAULT_LADDER[2])
    assert fixed in door.engine.seen and not door.leases.noted
    door.engine.auto_level = 3
    door.leases.is_away = False
    first, second = await asyncio.gather(*tasks)
    assert first.compression == second.compression == DEFAULT_LADDER[3], "it is chosen again"
    assert {choice.level for choice in door.leases.noted.values()} == {3}


async def test_calls_that_hang_keep_nobody_waiting_once_one_has_failed(door: Door) -> None:
    door.leases.is_away = True
    tasks = [asyncio.create_task(door.add("a", AutoConfig()))]
    await until(lambda: door.leases.num_calls)
    door.leases.answers.clear()
    tasks += [asyncio.create_task(door.add(name, AutoConfig())) for name in "bc"]
    num_calls = door.leases.num_calls
    await until(lambda: door.leases.num_calls > num_calls)
    for name in ("first", "second"):
        assert await door.add(name, DEFAULT_LADDER[2]) in door.engine.seen
    assert not door.leases.noted and not any(task.done() for task in tasks)
    door.leases.is_away = False
    door.leases.answers.set()
    await asyncio.gather(*tasks)
    assert set(door.leases.noted) == set("abc")


async def test_a_choice_that_was_stored_holds_although_its_reply_was_lost(door: Door) -> None:
    door.leases.loses_replies = True
    task = asyncio.create_task(door.add("a", AutoConfig()))
    await until(lambda: door.leases.num_calls)
    door.engine.auto_level = 3
    door.leases.loses_replies = False
    assert (await task).compression == DEFAULT_LADDER[1]
    job = door.jobs.get("a")
    assert job is not None and job.choice is not None and job.choice.level == 1


async def test_a_job_that_was_chosen_for_before_keeps_its_compression(door: Door) -> None:
    chosen = CompressionChoice(
        compression=DEFAULT_LADDER[3].as_dict(), level=3, reason=Reason.QUEUE, predicted_ttft_s=1.0
    )
    job = job_of("a", AutoConfig())
    job.delivery = replace(job.delivery, choice=chosen)
    again = sequence("a")
    await door.entrance.add(job, again)
    assert again.compression == DEFAULT_LADDER[3] and job.choice == chosen
    assert not door.leases.num_calls and not door.engine.outlooks
