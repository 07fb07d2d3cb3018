"""A worker in this process, with a fake engine on a real Redis."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from app.messages import DoneEvent, ErrorEvent, JobEvent, JobState, StatusEvent
from app.metrics import WorkerMetrics
from app.settings import Settings
from app.worker.process import CPU_RUNNING_JOBS
from app.worker.worker import Worker
from dycoke_core.config import PRIORITIES
from dycoke_core.errors import ModelLoadError
from tests.integration.fake_engine import FakeEngine, answer, text_of
from tests.integration.jobs import make_request
from tests.integration.workers import (
    Client,
    assert_gapless,
    running,
    token_ids,
    wait_until,
)


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
    assert 0.25 <= timings.queue < timings.total + 0.25  # 0.25 s of it by the engine's report
    assert 0 < timings.ttft <= timings.total
    assert (timings.vision, timings.prefill, timings.decode) == (0.5, 0.125, 2.0)
    assert done.memory.peak_device_bytes == 1000
    assert done.cache.model_dump() == {"frames": "miss", "features": "hit", "prefix": "miss"}


async def test_the_engine_learns_a_jobs_priority(settings: Settings, client: Client) -> None:
    async with running(settings) as worker:
        for priority in PRIORITIES:
            *_, done = await client.events(await client.ask("why?", priority=priority))
            assert isinstance(done, DoneEvent) and done.priority == priority
        assert [sequence.priority for sequence in worker.engine.seen] == list(PRIORITIES)


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
    settings: Settings, hasty: Settings, client: Client
) -> None:
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


async def test_failure_to_load_is_raised(settings: Settings, redis: Redis) -> None:
    def fail() -> FakeEngine:
        raise ModelLoadError("no such model")

    worker = Worker(
        settings, redis, fail, WorkerMetrics(CollectorRegistry(), model="m"), worker_id="w"
    )
    with pytest.raises(ModelLoadError):
        await worker.run()
    assert worker.close()


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
