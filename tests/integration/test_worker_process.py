"""Worker processes that die, stall and stop, with a fake engine on a real Redis."""

import asyncio
import os
import re
import signal
import urllib.request
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace

import psutil
import pytest
from redis.asyncio import Redis

from app.messages import DoneEvent, ErrorEvent, JobState
from app.settings import Settings
from app.store.keys import RedisKeys
from app.supervisor import ChildSpec, RestartPolicy, Supervisor
from app.worker.pool import worker_specs
from tests.integration.conftest import RedisServer
from tests.integration.fake_engine import answer, text_of
from tests.integration.workers import (
    LONG_LEASE_S,
    PATIENCE_S,
    Client,
    WorkerProcess,
    assert_gapless,
    client_of,
    environment,
    token_ids,
    wait_until,
    worker_argv,
)

ENDLESS = 100_000  # tokens


@pytest.fixture
def settings(redis_server: RedisServer, keys: RedisKeys) -> Settings:
    return Settings(
        redis_url=redis_server.url,
        redis_prefix=keys.prefix,
        lease_s=LONG_LEASE_S,
        drain_timeout_s=0.5,
        worker_metrics_port=0,
    )


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[Client]:
    async with client_of(settings) as client:
        yield client


async def test_killed_workers_answer_goes_on_at_the_next_token(
    settings: Settings, client: Client
) -> None:
    question = "sleep:0.02"
    with WorkerProcess(settings) as first:
        job_id = await client.ask(question, max_tokens=40)
        await client.wait_for_token(job_id, 5)
        first.send(signal.SIGKILL)
        await first.wait()
        with WorkerProcess(settings):
            await client.wait_for_takeover(job_id)
            events = await client.events(job_id)
    assert_gapless(events)
    assert token_ids(events) == answer(question, 40)
    done = events[-1]
    assert isinstance(done, DoneEvent)
    assert (done.attempts, done.usage.completion_tokens) == (2, 40)
    assert done.text == "".join(map(text_of, answer(question, 40)))


async def test_stalled_worker_that_comes_back_writes_nothing(
    settings: Settings, client: Client, redis: Redis, keys: RedisKeys
) -> None:
    question = "sleep:0.02"
    with WorkerProcess(settings) as first:
        job_id = await client.ask(question, max_tokens=150)
        await client.wait_for_token(job_id, 5)
        first_id = await client.worker_of(job_id)
        first.send(signal.SIGSTOP)
        with WorkerProcess(settings):
            await client.wait_for_takeover(job_id)
            first.send(signal.SIGCONT)  # both have the job now; one may write
            events = await client.events(job_id)
            assert token_ids(events) == answer(question, 150)
            done = events[-1]
            assert isinstance(done, DoneEvent) and done.attempts == 2

            async def serves_on() -> bool:
                other = await client.ask(question)
                assert isinstance((await client.events(other))[-1], DoneEvent)
                return await client.worker_of(other) == first_id

            await wait_until(serves_on)  # the first has dropped the job


async def test_poison_job_goes_to_the_dead_letters_and_its_neighbours_live(
    settings: Settings, client: Client, redis: Redis, keys: RedisKeys
) -> None:
    env = environment(settings.model_copy(update={"lease_s": 1.0}))  # its end goes unreported
    specs = [ChildSpec(f"worker-{i}", worker_argv(i), env=env) for i in range(2)]
    restarts = RestartPolicy(first_wait_s=0.05, max_wait_s=0.2)
    supervisor = asyncio.create_task(Supervisor(specs, restarts=restarts).run())
    await client.wait_for_workers(2)
    questions = [f"sleep:0.05 neighbour {i}" for i in range(6)]
    jobs = {question: await client.ask(question, max_tokens=12) for question in questions}
    poison = await client.ask("sleep:0.05 poison", max_tokens=12)

    *_, last = await client.events(poison)
    assert isinstance(last, ErrorEvent)
    assert (last.code, last.retryable) == ("job_failed_repeatedly", False)
    for question, job_id in jobs.items():
        events = await client.events(job_id)
        assert isinstance(events[-1], DoneEvent)
        assert token_ids(events) == answer(question, 12)
    letters = [fields[b"job_id"].decode() for _, fields in await redis.xrange(keys.dead)]
    assert letters == [poison]
    assert await redis.hget(keys.job(poison), "deaths") == b"2"

    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(PATIENCE_S):
        assert await supervisor == 0


async def test_job_whose_workers_are_killed_from_outside_is_not_buried(
    settings: Settings, client: Client, redis: Redis, keys: RedisKeys
) -> None:
    """Alone each time, and its pool lives and sees it."""
    question = "sleep:0.05"
    specs = [
        replace(spec, argv=worker_argv(0), env={**spec.env, **environment(settings)})
        for spec in worker_specs(settings, env={})
    ]
    restarts = RestartPolicy(first_wait_s=0.05, max_wait_s=0.2)
    supervisor = asyncio.create_task(Supervisor(specs, restarts=restarts).run())
    job_id = await client.ask(question, max_tokens=60)
    for attempt in (1, 2, 3, 4):
        await wait_for_attempt(client, [job_id], attempt)
        for process in psutil.Process().children():
            if worker_argv(0)[2] in process.cmdline():
                process.kill()
    events = await client.events(job_id)
    done = events[-1]
    assert isinstance(done, DoneEvent) and done.attempts == 5
    assert token_ids(events) == answer(question, 60)
    assert await redis.hget(keys.job(job_id), "deaths") is None

    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(PATIENCE_S):
        assert await supervisor == 0


async def test_neighbours_of_a_worker_that_was_killed_survive_the_next_kill(
    settings: Settings, client: Client
) -> None:
    questions = [f"sleep:0.02 innocent {i}" for i in range(3)]
    with WorkerProcess(settings) as worker:
        jobs = {question: await client.ask(question, max_tokens=40) for question in questions}
        for job_id in jobs.values():
            await client.wait_for_token(job_id, 2)
        worker.send(signal.SIGKILL)
        await worker.wait()
    await expire_leases(client, jobs.values())
    with WorkerProcess(settings) as worker:
        await wait_for_attempt(client, list(jobs.values()), 2)
        await asyncio.sleep(0.3)
        worker.send(signal.SIGKILL)
        await worker.wait()
    await expire_leases(client, jobs.values())
    with WorkerProcess(settings):
        for question, job_id in jobs.items():
            events = await client.events(job_id)
            assert isinstance(events[-1], DoneEvent)
            assert token_ids(events) == answer(question, 40)


async def test_pauses_past_the_lease_bury_nobody(
    settings: Settings, client: Client, redis: Redis, keys: RedisKeys
) -> None:
    question = "sleep:0.05"
    with WorkerProcess(settings, 0) as zero, WorkerProcess(settings, 1) as one:
        await client.wait_for_workers(2)
        job_id = await client.ask(question, max_tokens=ENDLESS)
        await client.wait_for_token(job_id, 2)
        for _ in range(3):
            holder = await client.worker_of(job_id)
            paused = zero if holder.split("-")[-2] == "0" else one
            paused.send(signal.SIGSTOP)
            await client.wait_for_takeover(job_id)
            paused.send(signal.SIGCONT)
            # It finds its lease lost; as it is alive, the job is acquitted.
            await wait_until(lambda: has(redis, keys.job(job_id), losses=0, deliveries=1))
        last = int(await redis.hget(keys.job(job_id), "next_index"))
        await client.wait_for_token(job_id, last + 5)
        assert (await client.queue.get(job_id)).attempts == 4
        assert await client.cancel(job_id)
    events = await client.events(job_id)
    assert_gapless(events)
    published = token_ids(events)
    assert published == answer(question, len(published))
    assert await has(redis, keys.job(job_id), deaths=0)


async def has(redis: Redis, key: str, **expected: int) -> bool:
    """Whether a hash counts this; what it lacks counts as 0."""
    values = await redis.hmget(key, list(expected))
    return [int(value or 0) for value in values] == list(expected.values())


async def expire_leases(client: Client, job_ids: Iterable[str]) -> None:
    for worker_id in {await client.worker_of(job_id) for job_id in job_ids}:
        await client.expire_leases(worker_id)


async def wait_for_attempt(client: Client, job_ids: list[str], attempt: int) -> None:
    """Waits until one of the jobs has been taken so often, or ends."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            for job_id in job_ids:
                record = await client.queue.get(job_id)
                if record.attempts >= attempt or record.state.is_final:
                    return
            await asyncio.sleep(0.02)


async def test_drained_process_hands_back_and_exits_cleanly(
    settings: Settings, client: Client
) -> None:
    question = "sleep:0.02"
    with WorkerProcess(settings) as first:
        job_id = await client.ask(question, max_tokens=100)
        await client.wait_for_token(job_id, 5)
        first.send(signal.SIGTERM)
        assert await first.wait() == 0
    assert await client.registry.cards() == []
    assert (await client.queue.get(job_id)).state is JobState.QUEUED
    with WorkerProcess(settings):
        events = await client.events(job_id)
    assert token_ids(events) == answer(question, 100)
    done = events[-1]
    assert isinstance(done, DoneEvent) and done.attempts == 2


async def test_idle_process_stops_at_once(settings: Settings, client: Client) -> None:
    patient = settings.model_copy(update={"drain_timeout_s": 10 * PATIENCE_S})
    with WorkerProcess(patient) as worker:
        await client.wait_for_workers(1)
        worker.send(signal.SIGTERM)
        assert await worker.wait() == 0


async def test_process_serves_its_metrics(
    settings: Settings, client: Client, capfd: pytest.CaptureFixture[str]
) -> None:
    with WorkerProcess(settings) as worker:
        await client.events(await client.ask("why?"))
        port = re.search(r'"message": "serving metrics", "port": (\d+)', capfd.readouterr().err)
        assert port
        url = f"http://127.0.0.1:{port[1]}/metrics"
        page = (await asyncio.to_thread(_get, url)).decode()
        assert 'dycoke_prompt_tokens_total{model="dycoke-tiny",policy="full"} 20.0' in page
        worker.send(signal.SIGTERM)
        assert await worker.wait() == 0


async def test_worker_waits_for_a_redis_that_comes_later(
    own_redis_server: RedisServer, keys: RedisKeys
) -> None:
    settings = Settings(
        redis_url=own_redis_server.url, redis_prefix=keys.prefix, worker_metrics_port=0
    )
    own_redis_server.stop()
    with WorkerProcess(settings):
        await asyncio.sleep(0.5)
        own_redis_server.start()
        async with client_of(settings) as client:
            assert token_ids(await client.events(await client.ask("why?"))) == answer("why?", 8)


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
        body: bytes = response.read()
    return body
