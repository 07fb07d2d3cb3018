"""Deadlines that clients set: when they pass, and when it is clear that they will."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from app.errors import DeadlineUnreachableError
from app.messages import DoneEvent, ErrorEvent
from app.settings import Settings
from app.store.job_leases import JobLeases
from app.store.job_queue import JobQueue
from app.store.keys import RedisKeys
from app.store.owner_limits import Allowance
from dycoke_core.config import Priority
from tests.integration.api import EventReader, RunningApi, ScriptedWorker, running_api
from tests.integration.conftest import RedisServer
from tests.integration.jobs import LEASE_S, MODEL, leases_of, make_request, take, with_frames
from tests.integration.lua_clock import LuaClock
from tests.integration.openai_client import PATH, hello
from tests.integration.workers import Client, client_of, running

# --- the request ---


async def test_a_deadline_is_of_the_job_on_both_surfaces(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    posting = asyncio.create_task(api.post(stream=False, deadline_s=90.5))
    delivery = await worker.answer()
    request = delivery.request
    assert (request.deadline_s, request.deadline_at_s) == (90.5, request.accepted_at_s + 90.5)
    assert (await posting).status_code == 200
    job = (await api.client.get(f"/v1/jobs/{delivery.job_id}")).json()
    assert job["deadline_at_s"] == request.deadline_at_s

    answering = asyncio.create_task(worker.answer(1))
    body = {"messages": hello(), "deadline_s": 70}
    assert (await api.client.post(PATH, json=body)).status_code == 200
    request = (await answering).request
    assert (request.deadline_s, request.deadline_at_s) == (70, request.accepted_at_s + 70)


async def test_without_one_a_job_has_the_servers(api: RunningApi, worker: ScriptedWorker) -> None:
    posting = asyncio.create_task(api.post(stream=False))
    request = (await worker.answer()).request
    assert (await posting).status_code == 200
    assert request.deadline_s is None
    assert request.deadline_at_s == request.accepted_at_s + api.settings.job_timeout_s


async def test_a_deadline_that_passes_while_the_job_waits_ends_it(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    async with api.posting(deadline_s=2) as response:
        assert response.status_code == 200
        reader = EventReader(response)
        events = []
        while (event := await reader.next()) is not None:
            events.append(event)
    assert events[-1].name == "error"
    assert (events[-1].data["code"], events[-1].data["retryable"]) == ("deadline_exceeded", True)
    whole = await api.post(stream=False, deadline_s=2)
    assert (whole.status_code, whole.json()["code"]) == (504, "deadline_exceeded")
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0
    assert await ended(api) == {"client_deadline_exceeded": 2}


async def test_the_servers_own_deadline_counts_against_the_service(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with running_api(redis_server.url, keys, tmp_path, job_timeout_s=2.0) as api:
        response = await api.post(stream=False)
        assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")
        assert await ended(api) == {"deadline_exceeded": 1}
        body = {"messages": hello(), "deadline_s": 1}
        completion = await api.client.post(PATH, json=body)
        assert completion.json()["error"]["code"] == "deadline_exceeded", "clients see one code"
        assert await ended(api) == {"deadline_exceeded": 1, "client_deadline_exceeded": 1}


async def ended(api: RunningApi) -> dict[str, int]:
    """How many jobs came to each end, as the API counts them."""
    pattern = r'dycoke_requests_total{.*outcome="(\w+)".*} (\d+)'
    counts: Counter[str] = Counter()
    for outcome, number in re.findall(pattern, await api.metrics()):
        counts[outcome] += int(number)
    return {outcome: number for outcome, number in counts.items() if number}


# --- refused when it is clear that others go first ---


@pytest.fixture
async def clock(redis: Redis, keys: RedisKeys, monkeypatch: pytest.MonkeyPatch) -> LuaClock:
    return await LuaClock.start(redis, keys, monkeypatch)


@pytest.fixture
def queue(redis: Redis, keys: RedisKeys, clock: LuaClock) -> JobQueue:
    return JobQueue(redis, keys, result_ttl_s=60)


@pytest.fixture
async def leases(redis: Redis, keys: RedisKeys, clock: LuaClock) -> JobLeases:
    leases = leases_of(redis, keys, "worker-a")
    await leases.ensure_group()
    return leases


class Asker:
    """Queues jobs, some of which have a deadline."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._number = 0

    async def ask(
        self, deadline_s: float | None = None, *, owner: str = "a", priority: Priority = "normal"
    ) -> None:
        self._number += 1
        request = make_request(f"job{self._number}", timeout_s=deadline_s or 600.0).model_copy(
            update={"owner": owner, "priority": priority, "deadline_s": deadline_s}
        )
        await self._queue.reserve(MODEL, request.job_id, max_jobs=1000, lease_s=30)
        try:
            await self._queue.create(request, allowance=Allowance(owner, max_tokens=9))
        except DeadlineUnreachableError:
            await self._queue.release(MODEL, request.job_id)
            raise
        assert await self._queue.enqueue(with_frames(request))

    async def fill(self, number: int) -> None:
        for _ in range(number):
            await self.ask()

    async def is_refused(self, deadline_s: float, **of_whom: Any) -> bool:
        try:
            await self.ask(deadline_s, **of_whom)
        except DeadlineUnreachableError:
            return True
        return False


async def leave(leases: JobLeases, clock: LuaClock, number: int, *, every_s: float) -> None:
    for _ in range(number):
        await clock.advance(every_s)
        await take(leases)


async def test_a_deadline_that_even_twice_the_pace_would_miss_is_refused(
    queue: JobQueue, leases: JobLeases, clock: LuaClock
) -> None:
    asker = Asker(queue)
    await asker.fill(20)
    await leave(leases, clock, 8, every_s=40.0)
    # 12 wait: 480 s at this pace, 240 s at twice that.
    with pytest.raises(DeadlineUnreachableError) as refused:
        await asker.ask(200.0)
    assert 40 <= refused.value.retry_after_s <= 60
    assert (refused.value.code, refused.value.retryable) == ("deadline_unreachable", True)
    assert not await asker.is_refused(300.0)
    assert (await queue.depth(MODEL)).waiting == 13, "what is refused leaves nothing"


async def test_nobody_is_refused_by_a_pace_of_few_jobs_or_of_times_with_little_to_do(
    queue: JobQueue, leases: JobLeases, clock: LuaClock
) -> None:
    asker = Asker(queue)
    for _ in range(10):  # one at a time: how long it took says who asked, not who works
        await asker.ask()
        await leave(leases, clock, 1, every_s=600.0)
    await asker.fill(20)
    assert not await asker.is_refused(300.0)
    await leave(leases, clock, 7, every_s=600.0)
    assert not await asker.is_refused(300.0)
    await leave(leases, clock, 1, every_s=600.0)
    assert await asker.is_refused(300.0)


async def test_an_outage_says_nothing_of_the_pace(
    queue: JobQueue, leases: JobLeases, clock: LuaClock
) -> None:
    asker = Asker(queue)
    await asker.fill(40)
    await leave(leases, clock, 4, every_s=10.0)
    await leave(leases, clock, 1, every_s=3000.0)
    await leave(leases, clock, 5, every_s=10.0)  # 30 are left, for 150 s at twice the pace
    assert not await asker.is_refused(200.0)
    assert await asker.is_refused(100.0)


async def test_what_counts_is_who_would_go_first(
    queue: JobQueue, leases: JobLeases, clock: LuaClock
) -> None:
    asker = Asker(queue)
    await asker.fill(30)
    await leave(leases, clock, 9, every_s=40.0)  # 21 are left, for 420 s at twice the pace
    assert await asker.is_refused(300.0, priority="low")
    assert await asker.is_refused(300.0)
    assert not await asker.is_refused(300.0, owner="b"), "a share of its own"
    assert not await asker.is_refused(300.0, priority="high")
    assert await asker.is_refused(300.0)


async def test_a_job_that_was_handed_back_keeps_the_pace(
    queue: JobQueue, leases: JobLeases, clock: LuaClock
) -> None:
    asker = Asker(queue)
    await asker.fill(20)
    await leave(leases, clock, 7, every_s=40.0)
    await clock.advance(40.0)
    assert await leases.hand_back(await take(leases), lease_s=LEASE_S)
    assert await asker.is_refused(200.0)


async def test_a_deadline_that_has_passed_before_the_job_is_made_is_refused(
    queue: JobQueue, leases: JobLeases
) -> None:
    assert await Asker(queue).is_refused(1e-9)


async def test_a_refusal_names_the_video_and_says_when_to_come_back(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    refused = await api.post(deadline_s=1e-6)
    problem = refused.json()
    assert (refused.status_code, problem["code"]) == (504, "deadline_unreachable")
    assert problem["retryable"] and refused.headers["retry-after"] == "1"
    assert problem["video_id"] and "passed before the request was complete" in problem["detail"]
    completion = await api.client.post(PATH, json={"messages": hello(), "deadline_s": 1e-6})
    assert completion.status_code == 504
    assert completion.json()["error"]["code"] == "deadline_unreachable"
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0


# --- ended by the worker that takes it ---


@pytest.fixture
def settings(redis_server: RedisServer, keys: RedisKeys) -> Settings:
    return Settings(
        redis_url=redis_server.url, redis_prefix=keys.prefix, lease_s=0.6, drain_timeout_s=0.1
    )


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[Client]:
    async with client_of(settings) as client:
        yield client


async def test_a_first_token_that_cannot_come_in_time_ends_the_job(
    settings: Settings, client: Client
) -> None:
    async with running(settings) as worker:
        long = await client.ask("sleep:0.05", max_tokens=4000, timeout_s=600)
        await client.wait_for_token(long, 0)
        worker.engine.first_token_s = 1300.0
        late = await client.ask("why?", timeout_s=600, deadline_s=600)
        *_, last = await client.events(late)
        assert isinstance(last, ErrorEvent)
        assert (last.code, last.retryable) == ("deadline_unreachable", True)
        for in_time in (
            await client.ask("the server's own deadline", timeout_s=600),
            await client.ask("twice as fast would do", timeout_s=900, deadline_s=900),
        ):
            assert isinstance((await client.events(in_time))[-1], DoneEvent)
        worker.engine.first_token_s = None
        unknown = await client.ask("nobody knows", timeout_s=600, deadline_s=600)
        assert isinstance((await client.events(unknown))[-1], DoneEvent)
        assert late not in {s.sequence_id.partition("#")[0] for s in worker.engine.seen}
        assert await client.cancel(long)


async def test_an_engine_without_other_jobs_tries_whatever_is_predicted(
    settings: Settings, client: Client
) -> None:
    async with running(settings) as worker:
        worker.engine.first_token_s = 10_000.0
        job_id = await client.ask("why?", deadline_s=60)
        assert isinstance((await client.events(job_id))[-1], DoneEvent)


async def test_a_job_whose_first_token_is_there_is_not_given_up(
    settings: Settings, client: Client
) -> None:
    """It moves to a worker that could not begin it in time."""
    async with running(settings) as worker:
        job_id = await client.ask("sleep:0.02", max_tokens=100, timeout_s=600, deadline_s=600)
        await client.wait_for_token(job_id, 3)
        assert await worker.stop()
    long = await client.ask("sleep:0.02 too", max_tokens=4000, timeout_s=600)
    async with running(settings, "worker-b") as other:
        other.engine.first_token_s = 10_000.0
        *_, last = await client.events(job_id)
        assert isinstance(last, DoneEvent) and last.attempts == 2
        assert await client.cancel(long)


async def test_a_job_that_is_taken_after_its_deadline_never_reaches_the_engine(
    settings: Settings, client: Client
) -> None:
    job_id = await client.ask("why?", timeout_s=-0.1)
    async with running(settings) as worker:
        *_, last = await client.events(job_id)
        assert isinstance(last, ErrorEvent) and last.code == "deadline_exceeded"
        assert not worker.engine.seen
