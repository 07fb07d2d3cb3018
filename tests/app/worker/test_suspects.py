"""Suspects and other jobs on the same worker: both make progress, though no answer here ends."""

import asyncio

import pytest
from redis.asyncio import Redis

from app.messages import DoneEvent, JobRequest, JobState, TokenEvent
from app.settings import Settings
from app.store.keys import RedisKeys
from app.worker import job_taker
from tests.integration.fake_engine import answer
from tests.integration.workers import Client, RunningWorker, running, wait_until

ENDLESS = 100_000  # tokens


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """No answer here ends, so a worker that stops hands it back."""
    return settings.model_copy(update={"drain_timeout_s": 0.1})


async def suspects(
    settings: Settings, client: Client, redis: Redis, keys: RedisKeys, number: int
) -> list[str]:
    """Endless jobs with two tokens each that wait for a worker."""
    async with running(settings, "first") as worker:
        jobs = [
            await client.ask(f"sleep:0.02 suspect-{i}", max_tokens=ENDLESS) for i in range(number)
        ]
        for job_id in jobs:
            await client.wait_for_token(job_id, 2)
        assert await worker.stop()
    for job_id in jobs:
        assert (await client.queue.get(job_id)).state is JobState.QUEUED
        await redis.hset(keys.job(job_id), "is_suspect", 1)
    return jobs


async def are_cleared(redis: Redis, keys: RedisKeys, jobs: list[str]) -> bool:
    flags = [await redis.hget(keys.job(job_id), "is_suspect") for job_id in jobs]
    return flags == [b"0"] * len(jobs)


async def check_start(client: Client, job_id: str, question: str, num_tokens: int) -> None:
    """The answer's first tokens are those of an undisturbed run, each once."""
    ids: list[int] = []
    async for event in client.follow(job_id):
        if isinstance(event, TokenEvent):
            assert event.index == len(ids)
            ids += event.token_ids
        if len(ids) >= num_tokens:
            break
    assert ids[:num_tokens] == answer(question, num_tokens)


async def test_cleared_suspect_makes_way_for_the_next(
    settings: Settings, client: Client, redis: Redis, keys: RedisKeys
) -> None:
    jobs = await suspects(settings, client, redis, keys, 3)
    async with running(settings, "next") as worker:
        together: set[int] = set()
        watching = asyncio.create_task(watch(client, redis, keys, worker, jobs, together))
        await wait_until(lambda: are_cleared(redis, keys, jobs))
        watching.cancel()
        assert together <= {0, 1}, "a suspect has the engine to itself"
        for number, job_id in enumerate(jobs):
            assert not (await client.queue.get(job_id)).state.is_final
            await check_start(client, job_id, f"sleep:0.02 suspect-{number}", 60)
            assert int(await redis.hget(keys.job(job_id), "deliveries")) <= 2


async def watch(
    client: Client,
    redis: Redis,
    keys: RedisKeys,
    worker: RunningWorker,
    jobs: list[str],
    together: set[int],
) -> None:
    """Notes how many are in the engine while one of these runs as a suspect."""
    while True:
        num_before = len(worker.engine.sequences)
        flags = [await redis.hmget(keys.job(j), "is_suspect", "is_in_engine") for j in jobs]
        if [b"1", b"1"] in flags:
            together.add(min(num_before, len(worker.engine.sequences)))
        await asyncio.sleep(0.01)


async def test_fresh_job_does_not_wait_for_the_answers_of_suspects(
    settings: Settings, client: Client, redis: Redis, keys: RedisKeys
) -> None:
    jobs = await suspects(settings, client, redis, keys, 3)
    async with running(settings, "next"):
        fresh = await client.ask("fresh")
        assert isinstance((await client.events(fresh))[-1], DoneEvent)
        for job_id in jobs:
            assert not (await client.queue.get(job_id)).state.is_final


async def test_long_answer_makes_way_for_a_suspect_and_goes_on(
    settings: Settings,
    client: Client,
    redis: Redis,
    keys: RedisKeys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_taker, "MAX_COMPANY_S", 0.2)
    enqueue = client.queue.enqueue

    async def enqueue_suspect(request: JobRequest) -> bool:
        await redis.hset(keys.job(request.job_id), "is_suspect", 1)
        return await enqueue(request)

    async with running(settings, "busy"):
        busy = await client.ask("sleep:0.02 busy", max_tokens=ENDLESS)
        await client.wait_for_token(busy, 2)
        monkeypatch.setattr(client.queue, "enqueue", enqueue_suspect)
        suspect = await client.ask("sleep:0.02 suspect", max_tokens=ENDLESS)
        await wait_until(lambda: are_cleared(redis, keys, [suspect]))
        last = await redis.hget(keys.job(busy), "next_index")
        await check_start(client, busy, "sleep:0.02 busy", int(last) + 5)
        await check_start(client, suspect, "sleep:0.02 suspect", 20)
