"""A worker in this process, with a fake engine on a real Redis."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from app import messages
from app.messages import DoneEvent, ErrorEvent, JobEvent, JobState, StatusEvent
from app.metrics import WorkerMetrics
from app.settings import Settings
from app.store.client import Scripts, connect
from app.store.forgotten_videos import ForgottenVideos
from app.store.job_leases import Append, Appended, JobLeases
from app.store.keys import GROUP, RedisKeys
from app.worker.process import CPU_RUNNING_JOBS
from app.worker.worker import Worker
from dycoke_core.config import PRIORITIES
from dycoke_core.errors import ModelLoadError
from dycoke_core.sequence import SAMPLER_VERSION, TokenEvent
from tests.integration.conftest import RedisServer
from tests.integration.fake_engine import FakeEngine, answer, text_of
from tests.integration.jobs import make_request
from tests.integration.workers import (
    PATIENCE_S,
    Client,
    assert_gapless,
    client_of,
    token_ids,
    tokens,
    wait_until,
)

LEASE_S = 0.6


@pytest.fixture
def settings(redis_server: RedisServer, keys: RedisKeys) -> Settings:
    return Settings(
        redis_url=redis_server.url, redis_prefix=keys.prefix, lease_s=LEASE_S, drain_timeout_s=20
    )


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[Client]:
    async with client_of(settings) as client:
        yield client


class RunningWorker:
    """A worker and what a test may look at: its engine, its metrics, its result."""

    def __init__(self, settings: Settings, redis: Redis, name: str) -> None:
        self.engine = FakeEngine(settings.max_running_jobs or CPU_RUNNING_JOBS)
        self.registry = CollectorRegistry()
        self.worker = Worker(
            settings,
            redis,
            lambda: self.engine,
            WorkerMetrics(self.registry, model=settings.model_name),
            worker_id=name,
        )
        self.task = asyncio.create_task(self.worker.run())

    async def stop(self) -> bool:
        self.worker.stop()
        async with asyncio.timeout(60):
            return await self.task

    def metric(self, name: str, **labels: str) -> float | None:
        labels = {"model": "dycoke-tiny", **labels}
        return self.registry.get_sample_value(f"dycoke_{name}", labels)


@asynccontextmanager
async def running(settings: Settings, name: str = "worker-a") -> AsyncIterator[RunningWorker]:
    assert settings.redis_url
    redis = connect(settings.redis_url)
    running = RunningWorker(settings, redis, name)
    try:
        yield running
    finally:
        running.task.cancel()
        await asyncio.gather(running.task, return_exceptions=True)
        assert await asyncio.to_thread(running.worker.close)
        await redis.aclose()


async def test_answer_streams_from_first_event_to_receipt(
    settings: Settings, client: Client
) -> None:
    async with running(settings):
        job_id = await client.ask("why?", max_tokens=4)
        opening, *middle, done = await client.events(job_id)
    assert isinstance(opening, JobEvent)
    stages = [event.stage for event in middle if isinstance(event, StatusEvent)]
    assert stages == ["encoding", "prefilling"]
    expected = answer("why?", 4)
    assert token_ids(middle) == expected
    assert_gapless(middle)
    assert isinstance(done, DoneEvent)
    assert done.text == "".join(map(text_of, expected))
    assert (done.finish_reason, done.attempts, done.job_id) == ("length", 1, job_id)
    assert (await client.queue.get(job_id)).state is JobState.DONE


async def test_receipt_holds_what_engine_and_queue_measured(
    settings: Settings, client: Client
) -> None:
    async with running(settings):
        done = (await client.events(await client.ask("why?", max_tokens=4)))[-1]
    assert isinstance(done, DoneEvent)
    assert done.usage.model_dump() == {
        "prompt_tokens": 20,
        "visual_tokens": 3,
        "completion_tokens": 4,
    }
    assert (done.compression.policy, done.compression.parameters) == ("full", {})
    assert done.compression.flops.paper.ratio == 0.5
    assert done.compression.flops.exact.ratio == 0.25
    timings = done.timings_s
    assert 0.25 <= timings.queue < timings.total + 0.25  # 0.25 s of it are the engine's word
    assert 0 < timings.ttft <= timings.total
    assert (timings.vision, timings.prefill, timings.decode) == (0.5, 0.125, 2.0)
    assert done.memory.peak_device_bytes == 1000
    assert done.cache.model_dump() == {"frames": "miss", "features": "hit", "prefix": "miss"}


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


async def test_the_engine_learns_a_jobs_priority(settings: Settings, client: Client) -> None:
    async with running(settings) as worker:
        for priority in PRIORITIES:
            *_, done = await client.events(await client.ask("why?", priority=priority))
            assert isinstance(done, DoneEvent) and done.priority == priority
        assert [sequence.priority for sequence in worker.engine.seen] == list(PRIORITIES)


async def test_cancelled_running_job_leaves_the_engine_at_once(
    settings: Settings, client: Client
) -> None:
    async with running(settings) as worker:
        job_id = await client.ask("sleep:0.02", max_tokens=4000)
        neighbour = await client.ask("sleep:0.02 too", max_tokens=40)
        await client.wait_for_token(job_id, 2)
        assert await client.cancel(job_id)
        sequence = worker.engine.sequences[f"{job_id}#1"]
        num_tokens = len(sequence.output_token_ids)

        async def is_gone() -> bool:
            return f"{job_id}#1" not in worker.engine.sequences

        await wait_until(is_gone)
        # Not by the next renewal, but by the channel: well before a lease is over.
        assert len(sequence.output_token_ids) - num_tokens < LEASE_S / 3 / 0.02
        assert token_ids(await client.events(neighbour)) == answer("sleep:0.02 too", 40)
        *_, last = await client.events(job_id)
        assert isinstance(last, ErrorEvent) and last.code == "cancelled"


async def test_job_cancelled_while_queued_is_never_run(settings: Settings, client: Client) -> None:
    job_id = await client.ask("why?")
    assert await client.cancel(job_id)
    async with running(settings) as worker:
        other = await client.ask("what?")
        await client.events(other)
        assert worker.engine.aborted == []
    *_, last = await client.events(job_id)
    assert isinstance(last, ErrorEvent) and last.code == "cancelled"


async def test_deadline_ends_a_running_job(settings: Settings, client: Client) -> None:
    async with running(settings) as worker:
        job_id = await client.ask("sleep:0.02", max_tokens=4000, timeout_s=0.5)
        *_, last = await client.events(job_id)
        assert isinstance(last, ErrorEvent)
        assert (last.code, last.retryable) == ("deadline_exceeded", True)

        async def is_gone() -> bool:
            return f"{job_id}#1" not in worker.engine.sequences

        await wait_until(is_gone)


async def test_job_that_the_engine_refuses_or_fails_ends_in_an_error(
    settings: Settings, client: Client
) -> None:
    async with running(settings):
        refused, failed, fine = [await client.ask(q) for q in ("refuse", "fail", "fine")]
        *_, last = await client.events(refused)
        assert isinstance(last, ErrorEvent) and last.code == "prompt_too_long"
        *said, last = await client.events(failed)
        assert isinstance(last, ErrorEvent) and last.code == "engine_error"
        assert token_ids(said) == answer("fail", 2)
        assert token_ids(await client.events(fine)) == answer("fine", 8)


async def test_job_whose_frames_are_gone_ends_in_a_retryable_error(
    settings: Settings, client: Client, redis: Redis, keys: RedisKeys
) -> None:
    job_id = await client.ask("why?")
    await redis.delete(keys.frames("frames"))
    async with running(settings):
        *_, last = await client.events(job_id)
    assert isinstance(last, ErrorEvent)
    assert (last.code, last.retryable) == ("store_unavailable", True)


async def test_drain_finishes_what_it_can(settings: Settings, client: Client) -> None:
    async with running(settings) as worker:
        job_id = await client.ask("sleep:0.01", max_tokens=20)
        await client.wait_for_token(job_id, 2)
        late = asyncio.create_task(worker.stop())
        await client.wait_for_workers(0)
        waiting = await client.ask("later")
        assert await late
        assert token_ids(await client.events(job_id)) == answer("sleep:0.01", 20)
        assert (await client.queue.get(waiting)).state is JobState.QUEUED


async def test_drain_hands_back_the_rest_and_another_worker_goes_on(
    settings: Settings, client: Client
) -> None:
    hasty = settings.model_copy(update={"drain_timeout_s": 0.1})
    async with running(hasty) as worker:
        job_id = await client.ask("sleep:0.02", max_tokens=40)
        await client.wait_for_token(job_id, 5)
        assert await worker.stop()
        record = await client.queue.get(job_id)
        assert (record.state, record.position, record.attempts) == (JobState.QUEUED, 0, 1)
        published = len(await client.log.read(job_id))
        assert published > 5
    async with running(settings, "worker-b") as other:
        events = await client.events(job_id)
        assert token_ids(events) == answer("sleep:0.02", 40)
        assert_gapless(events)
        done = events[-1]
        assert isinstance(done, DoneEvent)
        assert (done.attempts, done.usage.completion_tokens) == (2, 40)
        assert done.text == "".join(map(text_of, answer("sleep:0.02", 40)))
        assert other.metric("lease_reclaims_total") == 1


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


async def test_engine_failure_ends_the_worker_and_its_job_goes_on_elsewhere(
    settings: Settings, client: Client
) -> None:
    async with running(settings) as worker:
        job_id = await client.ask("raise sleep:0.01")
        assert not await worker.task
    record = await client.queue.get(job_id)
    assert (record.state, record.attempts) == (JobState.QUEUED, 1)
    async with running(settings, "worker-b") as worker:  # raises again, two tokens on
        assert not await worker.task
    async with running(settings, "worker-c"):
        events = await client.events(job_id)
    assert token_ids(events) == answer("raise sleep:0.01", 4)
    last = events[-1]
    assert isinstance(last, ErrorEvent) and last.code == "job_failed_repeatedly"


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


async def test_failure_to_load_is_raised(settings: Settings, redis: Redis) -> None:
    def fail() -> FakeEngine:
        raise ModelLoadError("no such model")

    worker = Worker(
        settings, redis, fail, WorkerMetrics(CollectorRegistry(), model="m"), worker_id="w"
    )
    with pytest.raises(ModelLoadError):
        await worker.run()
    assert worker.close()


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

    async def held_append(leases: JobLeases, appends: Sequence[Append]) -> list[Appended]:
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


async def test_metrics_tell_what_the_engine_did(settings: Settings, client: Client) -> None:
    async with running(settings) as worker:
        for question in ("one", "two"):
            await client.events(await client.ask(question, max_tokens=4))
        job_id = await client.ask("sleep:0.02", max_tokens=4000)
        await client.wait_for_token(job_id, 1)
        metric = worker.metric
        assert metric("requests_running") == 1
        assert metric("requests_waiting") == 0
        assert metric("kv_cache_usage_ratio") == 0.25
        assert metric("device_memory_bytes") == 0
        for stage, count in {"input": 8, "prefill": 6, "decode": 4}.items():
            assert metric("visual_tokens_total", policy="full", stage=stage) == count
        assert metric("prompt_tokens_total", policy="full") == 40
        assert (metric("generation_tokens_total", policy="full") or 0) > 8
        assert metric("kv_refreshes_total", policy="full") == 2
        assert metric("requests_capacity") == CPU_RUNNING_JOBS
        for kind in ("full", "actual"):
            assert (metric("flops_total", policy="full", kind=kind) or 0) > 0
        assert metric("cache_misses_total", cache="frames") == 2
        assert metric("cache_hits_total", cache="features") == 2
        for stage in ("queue", "vision", "compress", "prefill", "decode"):
            assert metric("stage_seconds_count", policy="full", stage=stage) == 2
        await client.cancel(job_id)

        async def is_idle() -> bool:
            return metric("requests_running") == 0

        await wait_until(is_idle)


async def test_engine_is_told_of_deleted_videos(
    settings: Settings, client: Client, redis: Redis, keys: RedisKeys
) -> None:
    async with running(settings) as worker:
        await client.wait_for_workers(1)
        await ForgottenVideos(redis, keys).forget("video")
        await wait_until(lambda: asyncio.sleep(0, worker.engine.forgotten == ["video"]))


async def test_card_is_there_while_the_worker_takes_jobs(
    settings: Settings, client: Client
) -> None:
    async with running(settings) as worker:
        await client.wait_for_workers(1)
        (card,) = await client.registry.cards()
        assert (card.worker_id, card.model, card.image_size) == ("worker-a", "dycoke-tiny", 8)
        await worker.stop()
        assert await client.registry.cards() == []


async def test_redis_restart_in_mid_answer_loses_nothing(
    own_redis_server: RedisServer, keys: RedisKeys
) -> None:
    settings = Settings(redis_url=own_redis_server.url, redis_prefix=keys.prefix, lease_s=LEASE_S)
    async with client_of(settings) as client, running(settings) as worker:
        job_id = await client.ask("sleep:0.02", max_tokens=100)
        await client.wait_for_token(job_id, 5)
        own_redis_server.stop()
        await asyncio.sleep(2 * LEASE_S)  # longer than a lease
        own_redis_server.start()
        events = await client.events(job_id)
        assert token_ids(events) == answer("sleep:0.02", 100)
        done = events[-1]
        assert isinstance(done, DoneEvent) and done.attempts == 1
        # The channel, too, is listened to again.
        job_id = await client.ask("sleep:0.02", max_tokens=4000)
        await client.wait_for_token(job_id, 2)
        await client.cancel(job_id)

        async def is_gone() -> bool:
            return not worker.engine.sequences

        await wait_until(is_gone)


async def test_redis_that_lost_its_last_writes_is_told_them_again(
    settings: Settings, client: Client, redis: Redis, keys: RedisKeys
) -> None:
    async with running(settings):
        job_id = await client.ask("sleep:0.02", max_tokens=60)
        await client.wait_for_token(job_id, 10)
        # As if the last second of the append-only file had been lost.
        async with redis.pipeline(transaction=True) as pipeline:
            pipeline.hset(keys.job(job_id), mapping={"next_index": 4, "sequence": 0})
            pipeline.eval(
                "local newer = redis.call('XRANGE', KEYS[1], '5-0', '+') "
                "for _, entry in ipairs(newer) do redis.call('XDEL', KEYS[1], entry[1]) end "
                "redis.call('XSETID', KEYS[1], '4-0')",
                1,
                keys.events(job_id),
            )
            await pipeline.execute()
        events = await client.events(job_id)
    assert token_ids(events) == answer("sleep:0.02", 60)


async def test_redis_that_lost_everything_gets_its_group_back(
    own_redis_server: RedisServer, keys: RedisKeys
) -> None:
    settings = Settings(redis_url=own_redis_server.url, redis_prefix=keys.prefix, lease_s=LEASE_S)
    async with client_of(settings) as client, running(settings) as worker:
        job_id = await client.ask("sleep:0.02", max_tokens=4000)
        await client.wait_for_token(job_id, 2)
        await client.redis.flushall()

        async def is_gone() -> bool:
            return not worker.engine.sequences

        await wait_until(is_gone)
        job_id = await client.ask("why?")
        assert token_ids(await client.events(job_id)) == answer("why?", 8)
        await client.wait_for_workers(1)


async def test_workers_share_the_jobs(settings: Settings, client: Client) -> None:
    frugal = settings.model_copy(update={"max_running_jobs": 1})
    async with running(frugal, "worker-a"), running(frugal, "worker-b") as other:
        jobs = [await client.ask(f"sleep:0.02 {i}") for i in range(6)]
        for job_id in jobs:
            await client.events(job_id)
        share = other.metric("prompt_tokens_total", policy="full")
        assert share is not None and 0 < share < 6 * 20


def check_names(make: Callable[[CollectorRegistry], object]) -> set[str]:
    registry = CollectorRegistry()
    make(registry)
    return {metric.name for metric in registry.collect()}


def test_metric_names_are_the_agreed_ones() -> None:
    names = check_names(lambda registry: WorkerMetrics(registry, model="m"))
    assert names == {
        f"dycoke_{name}"
        for name in (
            "stage_seconds",
            "requests_running",
            "requests_waiting",
            "kv_cache_usage_ratio",
            "device_memory_bytes",
            "visual_tokens",
            "prompt_tokens",
            "generation_tokens",
            "cache_hits",
            "cache_misses",
            "lease_reclaims",
            "kv_refreshes",
            "requests_capacity",
            "flops",
            "auto_choices",
            "auto_objectives",
            "auto_prediction_error_seconds",
        )
    }


async def test_a_job_without_a_video_samples_no_metric_of_compression(
    settings: Settings, client: Client
) -> None:
    job_id = "text-only"
    request = make_request(job_id, model=client.model).model_copy(
        update={"video_id": None, "ignore_eos": True, "video_turn": None, "warnings": ["x: no"]}
    )
    await client.queue.reserve(client.model, job_id, max_jobs=9, lease_s=30)
    await client.queue.create(request)
    assert await client.queue.enqueue(request)
    async with running(settings) as worker:
        done = (await client.events(job_id))[-1]
        (sequence,) = worker.engine.seen
        assert sequence.frames is None and sequence.sampling.ignore_eos

        async def is_observed() -> bool:
            return worker.metric("prompt_tokens_total", policy="none") == 20

        await wait_until(is_observed)
        assert worker.metric("visual_tokens_total", policy="none", stage="input") is None
        assert worker.metric("flops_total", policy="none", kind="full") is None
        assert worker.metric("cache_hits_total", cache="features") == 0
    assert isinstance(done, DoneEvent)
    assert done.video_id is done.frames is done.cache is None and done.warnings == ["x: no"]
