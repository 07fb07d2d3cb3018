"""Policy `auto` in a worker: what it chooses, what crosses Redis, what the receipt says."""

from typing import Any

import pytest
from redis.asyncio import Redis

from app.messages import CompressionChoice, DoneEvent, ErrorEvent, JobEvent, StatusEvent
from app.settings import Settings
from app.store.keys import RedisKeys
from dycoke_core.auto import DEFAULT_LADDER, AutoConfig, Reason
from tests.integration.fake_engine import answer, question
from tests.integration.jobs import leases_of, take
from tests.integration.workers import Client, running, token_ids, wait_until

AUTO = AutoConfig(objective_s=3.0, at_least=0.1)


async def test_the_worker_chooses_and_the_receipt_and_the_metrics_tell(
    settings: Settings, client: Client
) -> None:
    async with running(settings) as worker:
        job_id = await client.ask("why?", max_tokens=4, compression=AUTO.as_dict())
        opening, *between, done = await client.events(job_id)
        (sequence,) = worker.engine.seen
        (waited_s,) = worker.engine.waited_s
        assert worker.metric("auto_choices_total", level="1", reason="objective") == 1

        async def is_counted() -> bool:
            return worker.metric("auto_objectives_total", met="true") == 1

        await wait_until(is_counted)
        assert worker.metric("auto_prediction_error_seconds_count") == 1
        assert worker.metric("generation_tokens_total", policy="dycoke") == 4
    assert sequence.compression == DEFAULT_LADDER[1]
    assert isinstance(opening, JobEvent) and opening.compression["policy"] == "auto"
    assert isinstance(done, DoneEvent)
    statuses = [event for event in between if isinstance(event, StatusEvent)]
    assert statuses[0].stage == "encoding" and statuses[0].auto is not None
    assert all(status.auto == statuses[0].auto for status in statuses)
    receipt = done.compression
    assert statuses[0].auto.model_dump() == {
        "compression": {"policy": receipt.policy, **receipt.parameters},
        "level": 1,
        "reason": Reason.OBJECTIVE,
        "predicted_ttft_s": waited_s + 0.5,
    }
    assert (receipt.policy, receipt.parameters["k"]) == ("dycoke", 0.5)
    assert receipt.auto is not None and receipt.auto.model_dump() == {
        "objective_s": 3.0,
        "at_least": 0.1,
        "level": 1,
        "num_levels": 4,
        "reason": Reason.OBJECTIVE,
        "predicted_ttft_s": waited_s + 0.5,
    }
    assert waited_s >= 0


async def test_an_answer_that_moves_to_another_worker_keeps_its_compression(
    settings: Settings, hasty: Settings, client: Client
) -> None:
    async with running(hasty) as worker:
        job_id = await client.ask("sleep:0.02", max_tokens=120, compression=AUTO.as_dict())
        await client.wait_for_token(job_id, 5)
        assert await worker.stop()
    async with running(settings, "worker-b") as other:
        other.engine.auto_level = 3
        *events, done = await client.events(job_id)
        (sequence,) = other.engine.seen
        assert not other.engine.waited_s, "it is not asked again"
    assert sequence.compression == DEFAULT_LADDER[1]
    assert token_ids(events) == answer("sleep:0.02", 120)
    assert isinstance(done, DoneEvent) and done.attempts == 2
    assert done.compression.auto is not None and done.compression.auto.level == 1


async def test_a_choice_of_a_worker_that_lost_the_job_is_not_noted(
    client: Client, settings: Settings, redis: Redis, keys: RedisKeys
) -> None:
    leases = leases_of(redis, keys, "a", model=client.model)
    await leases.ensure_group()
    job_id = await client.ask("why?", compression=AUTO.as_dict())
    delivery = await take(leases)
    choice = CompressionChoice(
        compression={"policy": "full"}, level=0, reason=Reason.OBJECTIVE, predicted_ttft_s=1.0
    )
    await client.cancel(job_id)
    assert not await leases.choose(delivery, choice)
    assert not await redis.hexists(keys.job(job_id), "choice")


async def test_a_worker_learns_what_waits_with_each_job_and_each_choice(
    client: Client, redis: Redis, keys: RedisKeys
) -> None:
    leases = leases_of(redis, keys, "a", model=client.model)
    await leases.ensure_group()
    for _ in range(70):
        await client.ask("why?", compression=AUTO.as_dict())
    first = await take(leases)
    assert first.queue is not None
    assert (first.queue.num_workers, first.queue.num_arrivals) == (1, 32)
    assert len(first.queue.queued_ms) == 64, "no more than a worker could look at"
    outlook = first.queue.outlook(held_at=(0.0,))
    assert len(outlook.waited_s) == 65 and outlook.arrivals_per_s > 0
    assert list(outlook.waited_s) == sorted(outlook.waited_s, reverse=True)
    other = leases_of(redis, keys, "b", model=client.model)
    second = await take(other)
    assert second.queue is not None
    assert second.queue.num_workers == 2 and len(second.queue.outlook().waited_s) == 32
    for _ in range(10):
        await take(other)
    choice = CompressionChoice(
        compression={"policy": "full"}, level=0, reason=Reason.OBJECTIVE, predicted_ttft_s=1.0
    )
    noted = await leases.choose(first, choice)
    assert noted is not None and noted.choice == choice and len(noted.queue.queued_ms) == 58
    later = choice.model_copy(update={"level": 3})
    again = await leases.choose(first, later)
    assert again is not None and again.choice == choice, "the first one that is stored holds"
    quoted = await client.ask('{"policy":"auto"}', compression={"policy": "full"})
    while (last := await take(other)).job_id != quoted:
        pass
    assert last.queue is None, "a job whose policy is named learns nothing, and costs nothing"


async def test_a_worker_sees_better_jobs_behind_a_long_backlog_of_low_ones(
    client: Client, redis: Redis, keys: RedisKeys
) -> None:
    leases = leases_of(redis, keys, "a", model=client.model)
    await leases.ensure_group()
    for _ in range(70):
        await client.ask("why?", compression={"policy": "full"}, priority="low")
    for priority in ("normal", "normal", "low", "high"):
        await client.ask("why?", compression=AUTO.as_dict(), priority=priority)
    first = await take(leases)
    assert first.request.priority == "high" and first.queue is not None
    assert first.queue.num_arrivals == 3, "nor do low ones count as load"
    seen = [len(first.queue.outlook(worst_rank=rank).waited_s) for rank in range(3)]
    assert seen == [0, 2, 66], "no more of the backlog than a worker could look at"


async def test_choices_are_made_when_the_engine_has_little_else_to_do(
    settings: Settings, client: Client
) -> None:
    async with running(settings) as worker:
        worker.engine.may_choose = False
        busy = await client.ask("sleep:0.01", max_tokens=10_000)
        await client.wait_for_token(busy, 2)
        jobs = [await client.ask("why?", max_tokens=2, compression=AUTO.as_dict()) for _ in "abc"]

        async def are_taken() -> bool:
            return not await client.redis.zcard(client.keys.queued(client.model))

        await wait_until(are_taken)
        await client.wait_for_token(busy, 10)
        assert not worker.engine.outlooks and len(worker.engine.seen) == 1
        await client.cancel(jobs.pop())
        known = await client.ask("known", max_tokens=2, compression=AUTO.as_dict())
        assert isinstance((await client.events(known))[-1], DoneEvent), "it does not wait"
        assert len(worker.engine.outlooks) == 1
        worker.engine.may_choose = True
        for job_id in jobs:
            assert isinstance((await client.events(job_id))[-1], DoneEvent)
        await client.cancel(busy)
    assert len(worker.engine.outlooks) == 3
    behind = [len(outlook.waited_s) for outlook in worker.engine.outlooks]
    assert behind[1:] == [1, 0], "a job that has ended is no longer counted"


@pytest.mark.parametrize("waiting", [AUTO.as_dict(), DEFAULT_LADDER[2].as_dict()])
async def test_who_waits_for_a_choice_passes_when_its_prefix_is_on_its_way(
    settings: Settings, client: Client, waiting: dict[str, Any]
) -> None:
    async with running(settings) as worker:
        worker.engine.may_choose = False
        busy = await client.ask("sleep:0.01", max_tokens=10_000)
        await client.wait_for_token(busy, 2)
        head = await client.ask("why?", max_tokens=2, compression=AUTO.as_dict())

        async def has_turn() -> bool:
            return worker.engine.num_asked_to_choose > 0

        await wait_until(has_turn)
        job_id = await client.ask("video:a why?", max_tokens=2, compression=waiting)

        async def are_taken() -> bool:
            return not await client.redis.zcard(client.keys.queued(client.model))

        await wait_until(are_taken)
        await client.wait_for_token(busy, 10)
        assert len(worker.engine.seen) == 1
        await client.ask(
            "video:a when?",
            priority="high",
            max_tokens=2,
            compression=DEFAULT_LADDER[2].as_dict(),
        )
        assert isinstance((await client.events(job_id))[-1], DoneEvent)
        assert worker.engine.seen[-1].compression == DEFAULT_LADDER[2]
        assert all(question(sequence) != "why?" for sequence in worker.engine.seen)
        worker.engine.may_choose = True
        assert isinstance((await client.events(head))[-1], DoneEvent)
        await client.cancel(busy)


async def test_a_prompt_that_fits_no_level_ends_the_job(settings: Settings, client: Client) -> None:
    async with running(settings):
        job_id = await client.ask("refuse", compression=AUTO.as_dict())
        *_, last = await client.events(job_id)
    assert isinstance(last, ErrorEvent) and last.code == "prompt_too_long"
