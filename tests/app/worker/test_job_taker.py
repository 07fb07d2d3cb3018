"""What a worker takes, when, and how it brings it to its engine."""

import asyncio
import threading
from collections import abc

import pytest
from redis.asyncio import Redis

from app import messages
from app.messages import DoneEvent, ErrorEvent, JobState
from app.settings import Settings
from app.store.client import Scripts
from app.store.job_leases import Append, Appended, JobLeases
from app.store.keys import GROUP, RedisKeys
from app.worker.process import CPU_RUNNING_JOBS
from dycoke_core.frame_content import content_of
from dycoke_core.sequence import SAMPLER_VERSION, FrameContent, Sequence, TokenEvent
from tests.integration.fake_engine import answer
from tests.integration.workers import (
    PATIENCE_S,
    Client,
    running,
    token_ids,
    tokens,
    wait_until,
)


async def test_jobs_run_side_by_side_up_to_the_limit(settings: Settings, client: Client) -> None:
    jobs = {q: await client.ask(q) for q in (f"sleep:0.01 {i}" for i in range(10))}
    async with running(settings) as worker:
        most = 0

        async def are_done() -> bool:
            nonlocal most
            most = max(most, len(worker.engine.sequences))
            records = [await client.queue.get(job_id) for job_id in jobs.values()]
            return all(record.state.is_final for record in records)

        await wait_until(are_done)
        assert 1 < most <= CPU_RUNNING_JOBS
    for question, job_id in jobs.items():
        assert token_ids(await client.events(job_id)) == answer(question, 8)


async def test_pixels_are_looked_at_before_the_engine_has_them(
    settings: Settings, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def watched(sequence: Sequence, frames_per_unit: int) -> FrameContent:
        threads.append(threading.current_thread().name)
        return content_of(sequence, frames_per_unit)

    monkeypatch.setattr("app.worker.job_taker.content_of", watched)
    job_id = await client.ask("why?")
    async with running(settings) as worker:
        await client.events(job_id)
        (sequence,) = worker.engine.seen
    assert sequence.frame_content is not None
    assert len(threads) == 1
    assert threads[0] not in ("engine", threading.main_thread().name)


async def test_the_clock_is_compared_with_the_stores(
    settings: Settings,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("app.worker.clock_check.MAX_OFF_S", -1.0)
    job_id = await client.ask("why?")
    async with running(settings):
        await client.events(job_id)
    assert "app.worker.clock_check" in {record.name for record in caplog.records}


async def test_job_cancelled_while_queued_is_never_run(settings: Settings, client: Client) -> None:
    job_id = await client.ask("why?")
    assert await client.cancel(job_id)
    async with running(settings) as worker:
        other = await client.ask("what?")
        await client.events(other)
        assert worker.engine.aborted == []
    *_, last = await client.events(job_id)
    assert isinstance(last, ErrorEvent) and last.code == "cancelled"


async def test_job_whose_frames_are_gone_ends_in_a_retryable_error(
    settings: Settings, client: Client, redis: Redis, keys: RedisKeys
) -> None:
    job_id = await client.ask("why?")
    await redis.delete(keys.frames("frames"))
    async with running(settings):
        *_, last = await client.events(job_id)
    assert isinstance(last, ErrorEvent)
    assert (last.code, last.retryable) == ("store_unavailable", True)


@pytest.mark.parametrize("noted", [SAMPLER_VERSION + 1, None])
async def test_drawn_answer_that_another_sampler_began_ends_in_a_retryable_error(
    settings: Settings, client: Client, redis: Redis, keys: RedisKeys, noted: int | None
) -> None:
    """None: the release that began it did not note its version, which then was 1."""
    job_id = await hand_back_in_mid_answer(settings, client, temperature=0.7)
    if noted is None:
        await redis.hdel(keys.job(job_id), "sampler_version")
    else:
        await redis.hset(keys.job(job_id), "sampler_version", noted)
    published = await client.log.read(job_id)
    async with running(settings, "worker-b") as worker:
        events = await client.events(job_id)
        assert not worker.engine.sequences
    last = events[-1]
    assert isinstance(last, ErrorEvent)
    assert (last.code, last.retryable) == ("sampler_changed", True)
    assert tokens(events) == tokens([logged.event for logged in published])


@pytest.mark.parametrize(
    ("temperature", "noted"), [(0.7, SAMPLER_VERSION), (0.0, SAMPLER_VERSION + 1)]
)
async def test_answer_goes_on_where_the_sampler_is_the_same_or_the_answer_greedy(
    settings: Settings,
    client: Client,
    redis: Redis,
    keys: RedisKeys,
    temperature: float,
    noted: int,
) -> None:
    job_id = await hand_back_in_mid_answer(settings, client, temperature=temperature)
    assert await redis.hget(keys.job(job_id), "sampler_version") == b"%d" % SAMPLER_VERSION
    await redis.hset(keys.job(job_id), "sampler_version", noted)
    async with running(settings, "worker-b"):
        events = await client.events(job_id)
    assert isinstance(events[-1], DoneEvent)
    assert token_ids(events) == answer("sleep:0.02", 40)


async def test_drawn_answer_may_begin_under_another_sampler_than_at_admission(
    settings: Settings, client: Client
) -> None:
    job_id = await client.ask("why?", max_tokens=4, temperature=0.7)
    assert (await client.queue.get(job_id)).request.sampler_version != SAMPLER_VERSION
    async with running(settings):
        assert isinstance((await client.events(job_id))[-1], DoneEvent)


async def hand_back_in_mid_answer(settings: Settings, client: Client, *, temperature: float) -> str:
    """A job of 40 tokens, some of them published, that waits for another worker."""
    async with running(settings.model_copy(update={"drain_timeout_s": 0.1})) as worker:
        job_id = await client.ask("sleep:0.02", max_tokens=40, temperature=temperature)
        await client.wait_for_token(job_id, 5)
        assert await worker.stop()
    assert (await client.queue.get(job_id)).state is JobState.QUEUED
    return job_id


async def test_suspect_has_the_engine_to_itself_until_it_is_cleared(
    settings: Settings, client: Client, redis: Redis, keys: RedisKeys
) -> None:
    question = "sleep:0.02 suspect"
    suspect = await client.ask(question, max_tokens=60)
    async with running(settings) as worker:
        await client.wait_for_token(suspect, 1)
        await redis.hset(keys.job(suspect), "is_suspect", 1)
        worker.task.cancel()
    async with running(settings, "worker-b") as worker:
        busy = await client.ask("sleep:0.02 busy", max_tokens=150)
        await client.wait_for_token(busy, 1)
        await client.wait_for(suspect, lambda record: record.attempts == 2)
        fresh = await client.ask("fresh")
        alone = set()
        async for event in client.follow(suspect):
            if isinstance(event, messages.TokenEvent) and 5 < event.index < 15:
                alone.add(len(worker.engine.sequences))
        assert alone == {1}
        for job_id in (busy, fresh):
            assert isinstance((await client.events(job_id))[-1], DoneEvent)
    assert token_ids(await client.events(suspect)) == answer(question, 60)


async def test_own_lease_that_ran_out_is_taken_up_anew(
    settings: Settings, client: Client, redis: Redis, keys: RedisKeys
) -> None:
    """As after a pause of the whole process: the worker meets its own job's next attempt."""
    async with running(settings):
        job_id = await client.ask("sleep:0.02", max_tokens=60)
        await client.wait_for_token(job_id, 2)
        entry_id = await redis.hget(keys.job(job_id), "entry_id")
        # Past the lease for a moment; whether renewal or intake comes first, the answer is whole.
        await redis.xclaim(
            keys.jobs(client.model), GROUP, "worker-a", 0, [entry_id], idle=60_000, justid=True
        )
        events = await client.events(job_id)
    assert isinstance(events[-1], DoneEvent)
    assert token_ids(events) == answer("sleep:0.02", 60)


async def test_what_an_attempt_left_behind_does_not_touch_the_next(
    settings: Settings,
    client: Client,
    redis: Redis,
    keys: RedisKeys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker takes its own job again while a step and an append of the first are under way."""
    may_step, is_in_step = threading.Event(), threading.Event()
    may_append = asyncio.Event()
    may_step.set()
    may_append.set()
    append = JobLeases.append

    async def held_append(leases: JobLeases, appends: abc.Sequence[Append]) -> list[Appended]:
        await may_append.wait()
        return await append(leases, appends)

    monkeypatch.setattr(JobLeases, "append", held_append)
    async with running(settings) as worker:
        engine, step = worker.engine, worker.engine.step

        def held_step() -> list[TokenEvent]:
            events = step()
            if not may_step.is_set():
                is_in_step.set()
                may_step.wait()
            return events

        monkeypatch.setattr(engine, "step", held_step)
        job_id = await client.ask("sleep:0.01", max_tokens=60)
        await client.wait_for_token(job_id, 2)
        (first,) = engine.sequences.values()
        may_append.clear()
        num_tokens = len(first.output_token_ids)

        async def has_gone_on() -> bool:
            return len(first.output_token_ids) > num_tokens + 3

        await wait_until(has_gone_on)
        may_step.clear()
        assert await asyncio.to_thread(is_in_step.wait, PATIENCE_S)
        entry_id = await redis.hget(keys.job(job_id), "entry_id")
        hand_back = (client.model, job_id, "worker-a", 1, entry_id, 1000, 0, 0)
        assert await Scripts(redis, keys.prefix).run("hand_back", *hand_back)
        await client.wait_for(job_id, lambda record: record.attempts == 2)
        may_step.set()

        async def is_taken_up() -> bool:
            return any(sequence is not first for sequence in list(engine.sequences.values()))

        await wait_until(is_taken_up)
        may_append.set()
        events = await client.events(job_id)
    assert isinstance(events[-1], DoneEvent)
    assert token_ids(events) == answer("sleep:0.01", 60)


async def test_workers_share_the_jobs(settings: Settings, client: Client) -> None:
    frugal = settings.model_copy(update={"max_running_jobs": 1})
    async with running(frugal, "worker-a"), running(frugal, "worker-b") as other:
        jobs = [await client.ask(f"sleep:0.02 {i}") for i in range(6)]
        for job_id in jobs:
            await client.events(job_id)
        share = other.metric("prompt_tokens_total", policy="full")
        assert share is not None and 0 < share < 6 * 20
