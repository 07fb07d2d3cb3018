"""The life of a job on a real Redis: transitions, bounds, leases, fencing, failover."""

import asyncio
from contextlib import aclosing
from hashlib import sha1
from typing import Any

import pytest
from redis.asyncio import Redis

from app.errors import (
    IdempotencyConflictError,
    JobNotFoundError,
    QueueFullError,
    StoreUnavailableError,
)
from app.messages import ErrorEvent, JobState, StatusEvent, TokenEvent
from app.store import job_leases
from app.store.client import Scripts, connect, load_script
from app.store.event_log import EventLog
from app.store.job_leases import Append, Delivery, JobLeases
from app.store.job_queue import MAX_ADOPTIONS, Idempotency, JobQueue, Orphan
from app.store.keys import GROUP, RedisKeys
from dycoke_core.sequence import SAMPLER_VERSION
from tests.integration.conftest import RedisServer
from tests.integration.jobs import (
    LEASE_S,
    MODEL,
    cancelled,
    leases_of,
    make_request,
    submit,
    take,
    take_over,
    token,
    with_frames,
)


@pytest.fixture
def queue(redis: Redis, keys: RedisKeys) -> JobQueue:
    return JobQueue(redis, keys, result_ttl_s=60)


@pytest.fixture
def log(redis: Redis, keys: RedisKeys) -> EventLog:
    return EventLog(redis, keys)


@pytest.fixture
async def leases(redis: Redis, keys: RedisKeys) -> JobLeases:
    leases = leases_of(redis, keys, "worker-a")
    await leases.ensure_group()
    return leases


@pytest.fixture
def other_leases(redis: Redis, keys: RedisKeys) -> JobLeases:
    return leases_of(redis, keys, "worker-b")


async def say(leases: JobLeases, delivery: Delivery, *indices: int) -> tuple[bool, int]:
    appended = (await leases.append([Append(delivery, [token(i) for i in indices])]))[0]
    return appended.is_accepted, appended.next_index


async def start(leases: JobLeases) -> Delivery:
    """Takes the next job and gives it to an engine."""
    delivery = await take(leases)
    assert await leases.enter(delivery)
    return delivery


async def finish(leases: JobLeases, delivery: Delivery) -> bool:
    final = ErrorEvent(code="x", message="x", retryable=False, job_id=delivery.job_id)
    return (await leases.append([Append(delivery, [], final)]))[0].is_accepted


async def event_types(log: EventLog, job_id: str) -> list[tuple[str, str]]:
    return [(e.id, e.event.type) for e in await log.read(job_id)]


async def entries(redis: Redis, keys: RedisKeys) -> tuple[int, int]:
    """How many entries the stream has, and how many of them are pending."""
    stream = keys.jobs(MODEL)
    return await redis.xlen(stream), (await redis.xpending(stream, GROUP))["pending"]


# --- admission ---


async def test_job_goes_from_reserved_to_done(
    queue: JobQueue, leases: JobLeases, log: EventLog, redis: Redis, keys: RedisKeys
) -> None:
    await queue.reserve(MODEL, "j", max_jobs=1, lease_s=30)
    request = make_request("j")
    await queue.create(request)
    assert (await queue.get("j")).state is JobState.READING
    await queue.append_status("j", StatusEvent(stage="reading_frames", progress=0.5))
    await queue.enqueue(with_frames(request))
    record = await queue.get("j")
    assert (record.state, record.position, record.attempts) == (JobState.QUEUED, 0, 0)

    delivery = await take(leases)
    assert delivery.request == with_frames(request)
    assert (delivery.attempt, delivery.published, delivery.is_suspect) == (1, (), False)
    record = await queue.get("j")
    assert (record.state, record.position, record.attempts) == (JobState.RUNNING, None, 1)

    assert await say(leases, delivery, 0, 1) == (True, 2)
    assert await finish(leases, delivery)
    record = await queue.get("j")
    assert record.state is JobState.ERROR and record.ended_at_s is not None
    assert await event_types(log, "j") == [
        ("0-1", "job"),
        ("0-2", "status"),
        ("1-0", "token"),
        ("2-0", "token"),
        ("3-0", "error"),
    ]
    assert await entries(redis, keys) == (0, 0)
    assert 0 < await redis.pttl(keys.job("j")) <= 60_000
    assert 0 < await redis.pttl(keys.events("j")) <= 60_000
    assert await redis.zcard(keys.live) == 0


async def test_full_queue_refuses_and_says_when_to_come_back(
    queue: JobQueue, leases: JobLeases
) -> None:
    await submit(queue, "a")
    await queue.reserve(MODEL, "b", max_jobs=2, lease_s=30)
    await queue.reserve(MODEL, "b", max_jobs=2, lease_s=30)  # its own place is no obstacle
    with pytest.raises(QueueFullError) as refusal:
        await queue.reserve(MODEL, "c", max_jobs=2, lease_s=30)
    assert refusal.value.retry_after_s >= 1
    await take(leases)
    await queue.reserve(MODEL, "c", max_jobs=2, lease_s=30)
    with pytest.raises(QueueFullError):
        await queue.reserve(MODEL, "d", max_jobs=2, lease_s=30)
    await queue.release(MODEL, "b")
    await queue.reserve(MODEL, "d", max_jobs=2, lease_s=30)


async def test_concurrent_reservations_never_exceed_the_limit(queue: JobQueue) -> None:
    results = await asyncio.gather(
        *(queue.reserve(MODEL, f"j{i}", max_jobs=5, lease_s=30) for i in range(20)),
        return_exceptions=True,
    )
    assert sum(result is None for result in results) == 5
    assert sum(isinstance(result, QueueFullError) for result in results) == 15


async def test_place_that_is_not_renewed_becomes_free(queue: JobQueue) -> None:
    await queue.reserve(MODEL, "a", max_jobs=1, lease_s=0.05)
    await asyncio.sleep(0.1)
    await queue.reserve(MODEL, "b", max_jobs=1, lease_s=30)
    await queue.sweep()
    assert not await queue.renew_place(MODEL, "a", lease_s=30)
    assert await queue.renew_place(MODEL, "b", lease_s=30)
    with pytest.raises(StoreUnavailableError):
        await queue.create(make_request("a"))


async def test_idempotency_key_stands_for_one_job(queue: JobQueue) -> None:
    key = Idempotency("key", "body", ttl_s=60)
    for job_id in ("a", "b", "c"):
        await queue.reserve(MODEL, job_id, max_jobs=3, lease_s=30)
    assert (await queue.create(make_request("a"), idempotency=key)).job_id == "a"
    assert (await queue.create(make_request("b"), idempotency=key)).job_id == "a"
    with pytest.raises(IdempotencyConflictError):
        await queue.create(make_request("c"), idempotency=Idempotency("key", "other", ttl_s=60))
    with pytest.raises(JobNotFoundError):
        await queue.get("b")
    assert (await queue.depth(MODEL)).waiting == 1


async def test_idempotency_key_of_a_forgotten_job_is_free(
    queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    key = Idempotency("key", "body", ttl_s=60)
    await queue.reserve(MODEL, "a", max_jobs=3, lease_s=30)
    await queue.create(make_request("a"), idempotency=key)
    await redis.delete(keys.job("a"))
    await queue.reserve(MODEL, "b", max_jobs=3, lease_s=30)
    assert (await queue.create(make_request("b"), idempotency=key)).job_id == "b"


async def test_repeating_a_transition_changes_nothing(
    queue: JobQueue, leases: JobLeases, log: EventLog, redis: Redis, keys: RedisKeys
) -> None:
    request = await submit(queue, "j")
    assert (await queue.create(request)).job_id == "j"
    assert await queue.enqueue(request)
    assert await entries(redis, keys) == (1, 0)
    delivery = await take(leases)
    assert await queue.enqueue(request)
    await say(leases, delivery, 0, 1)
    assert await say(leases, delivery, 0, 1, 2) == (True, 3)
    assert await finish(leases, delivery)
    assert await finish(leases, delivery)
    assert not await queue.enqueue(request)
    assert [t for _, t in await event_types(log, "j")] == [
        "job",
        "token",
        "token",
        "token",
        "error",
    ]


async def test_positions_follow_the_queue(queue: JobQueue, leases: JobLeases) -> None:
    for job_id in ("a", "b", "c"):
        await submit(queue, job_id)
        await asyncio.sleep(0.005)  # positions are by the millisecond of queueing
    assert [(await queue.get(i)).position for i in "abc"] == [0, 1, 2]
    assert (await take(leases)).job_id == "a"
    assert [(await queue.get(i)).position for i in "abc"] == [None, 0, 1]
    depth = await queue.depth(MODEL)
    assert (depth.waiting, depth.queued, depth.running) == (2, 2, 1)
    assert depth.oldest_age_s is not None and depth.oldest_age_s >= 0


async def test_stream_is_as_long_as_what_waits_and_what_runs(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    """What autoscalers read: the group's lag plus its pending entries."""
    for job_id in ("a", "b", "c"):
        await submit(queue, job_id)
    delivery = await take(leases)
    assert await entries(redis, keys) == (3, 1)
    assert await finish(leases, delivery)
    assert await entries(redis, keys) == (2, 0)


async def test_empty_queue_has_no_age(queue: JobQueue) -> None:
    depth = await queue.depth("never seen")
    assert (depth.waiting, depth.running, depth.oldest_age_s) == (0, 0, None)


async def test_unknown_jobs_are_not_found(queue: JobQueue, log: EventLog) -> None:
    with pytest.raises(JobNotFoundError):
        await queue.get("none")
    with pytest.raises(JobNotFoundError):
        await queue.end("none", JobState.CANCELLED, cancelled("none"))
    with pytest.raises(JobNotFoundError):
        await log.read("none")


# --- cancel, deadline, lost reader ---


async def test_cancel_while_reading(queue: JobQueue, log: EventLog, redis: Redis) -> None:
    await queue.reserve(MODEL, "j", max_jobs=1, lease_s=30)
    await queue.create(make_request("j"))
    assert await queue.end("j", JobState.CANCELLED, cancelled("j"))
    assert not await queue.enqueue(with_frames(make_request("j")))
    assert not await queue.renew_place(MODEL, "j", lease_s=30)
    assert not await queue.append_status("j", StatusEvent(stage="reading_frames"))
    assert (await queue.get("j")).state is JobState.CANCELLED
    assert (await queue.depth(MODEL)).waiting == 0


async def test_cancel_while_queued_leaves_the_unread_entry_to_the_next_worker(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    await submit(queue, "j")
    assert await queue.end("j", JobState.CANCELLED, cancelled("j"))
    assert (await queue.depth(MODEL)).waiting == 0
    assert await entries(redis, keys) == (1, 0)
    assert await leases.take(block_s=0.05) is None
    assert await entries(redis, keys) == (0, 0)


async def test_cancel_before_any_worker_came(queue: JobQueue) -> None:
    await submit(queue, "j")
    assert await queue.end("j", JobState.CANCELLED, cancelled("j"))


async def test_cancel_while_running_tells_and_fences_the_worker(
    queue: JobQueue, leases: JobLeases, log: EventLog, redis: Redis, keys: RedisKeys
) -> None:
    await submit(queue, "j")
    delivery = await take(leases)
    await say(leases, delivery, 0)
    async with aclosing(leases.ended()) as ended:
        assert await anext(ended) is None
        assert await queue.end("j", JobState.CANCELLED, cancelled("j"))
        assert not await queue.end("j", JobState.CANCELLED, cancelled("j"))
        while (job_id := await anext(ended)) is None:
            pass
        assert job_id == "j"
    assert await entries(redis, keys) == (0, 0)
    assert await say(leases, delivery, 1) == (False, 1)
    assert not await finish(leases, delivery)
    assert await leases.renew([delivery]) == [False]
    assert not await leases.hand_back(delivery, lease_s=LEASE_S)
    assert await event_types(log, "j") == [("0-1", "job"), ("1-0", "token"), ("2-0", "error")]


async def test_sweep_ends_overdue_jobs_and_finds_those_of_lost_readers(
    queue: JobQueue, leases: JobLeases
) -> None:
    await submit(queue, "runs", timeout_s=-1)
    delivery = await take(leases)
    await submit(queue, "waits", timeout_s=-1)
    await queue.reserve(MODEL, "reads", max_jobs=100, lease_s=0.01)
    await queue.create(make_request("reads"))
    await asyncio.sleep(0.05)

    sweep = await queue.sweep(grace_s=60)
    assert (sweep.overdue, sweep.orphans) == (("waits",), (Orphan(MODEL, "reads"),))
    assert (await queue.sweep(grace_s=60)).orphans == sweep.orphans
    assert (await queue.sweep(grace_s=0)).overdue == ("runs",)
    assert await say(leases, delivery, 0) == (False, 0)
    assert (await queue.sweep(grace_s=0)).overdue == ()


async def test_orphan_is_adopted_by_one_and_not_for_ever(queue: JobQueue, log: EventLog) -> None:
    await queue.reserve(MODEL, "reads", max_jobs=100, lease_s=0.01)
    request = make_request("reads")
    await queue.create(request)
    orphan = Orphan(MODEL, "reads")
    await asyncio.sleep(0.03)
    for reader in range(1, MAX_ADOPTIONS + 1):
        adopted = await asyncio.gather(*(queue.adopt(orphan, lease_s=30) for _ in range(5)))
        assert adopted.count(None) == 4 and (request, reader) in adopted
        failure = cancelled("reads")
        assert not await queue.end("reads", JobState.ERROR, failure, reader=reader - 1)
        assert await queue.renew_place(MODEL, "reads", lease_s=0)
    assert await queue.adopt(orphan, lease_s=30) is None
    last = (await log.read("reads"))[-1].event
    assert isinstance(last, ErrorEvent)
    assert (last.code, last.retryable) == ("reader_lost", True)
    assert (await queue.sweep()).orphans == ()


# --- what ended jobs leave behind ---


async def left_behind(redis: Redis, keys: RedisKeys, job_ids: str) -> list[str]:
    return [i for i in job_ids if await redis.exists(keys.job(i), keys.events(i))]


async def check_count_of_ended(redis: Redis, keys: RedisKeys, *job_ids: str) -> None:
    assert [i.decode() for i in await redis.zrange(keys.ended_jobs, 0, -1)] == [*job_ids]
    sizes = await redis.hgetall(keys.ended_sizes)
    assert {i.decode() for i in sizes} == {*job_ids}
    assert int(await redis.get(keys.ended_bytes)) == sum(map(int, sizes.values()))


async def test_oldest_ended_jobs_make_room_for_newer_ones(
    queue: JobQueue,
    leases: JobLeases,
    log: EventLog,
    redis: Redis,
    keys: RedisKeys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget = "MAX_ENDED_BYTES = 256 * 1024 * 1024"

    def load_small(name: str) -> tuple[str, str]:
        source, _ = load_script(name)
        assert budget in source or name not in ("append", "end")
        source = source.replace(budget, "MAX_ENDED_BYTES = 60000")
        return source, sha1(source.encode(), usedforsecurity=False).hexdigest()

    monkeypatch.setattr("app.store.client.load_script", load_small)
    await submit(queue, "r")
    running = await take(leases)
    await submit(queue, "q")
    for job_id in "abcd":
        await queue.reserve(MODEL, job_id, max_jobs=100, lease_s=30)
        request = make_request(job_id)
        long = [request.messages[0].model_copy(update={"content": "x" * 20_000})]
        await queue.create(request.model_copy(update={"messages": long}))
        assert await queue.end(job_id, JobState.CANCELLED, cancelled(job_id))
    assert await left_behind(redis, keys, "abcdrq") == ["c", "d", "r", "q"]
    await check_count_of_ended(redis, keys, "c", "d")
    with pytest.raises(JobNotFoundError):
        await queue.get("a")
    with pytest.raises(JobNotFoundError):
        await log.read("a")
    with pytest.raises(JobNotFoundError):
        await queue.end("a", JobState.CANCELLED, cancelled("a"))
    assert await say(leases, running, 0) == (True, 1)
    assert await finish(leases, running)
    assert (await take(leases)).job_id == "q"


async def test_ended_jobs_are_counted_for_as_long_as_they_are_kept(
    leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    fleeting = JobQueue(redis, keys, result_ttl_s=0.01)
    for job_id in "ab":
        await submit(fleeting, job_id)
        assert await fleeting.end(job_id, JobState.CANCELLED, cancelled(job_id))
        await asyncio.sleep(0.02)  # longer than it is kept
    await check_count_of_ended(redis, keys, "b")


# --- leases, fencing, redelivery ---


async def test_job_of_a_dead_worker_goes_on_where_it_stood(
    queue: JobQueue, leases: JobLeases, other_leases: JobLeases, log: EventLog
) -> None:
    await submit(queue, "j")
    first = await start(leases)
    await say(leases, first, 0, 1)
    second = await take_over(other_leases)
    assert (second.attempt, second.is_suspect) == (2, True)
    assert second.published == (token(0), token(1))
    assert second.published_token_ids == (100, 101)
    assert await say(leases, first, 2) == (False, 2)
    assert await leases.renew([first]) == [False]
    assert await say(other_leases, second, 2) == (True, 3)
    assert await finish(other_leases, second)
    assert [i for i, _ in await event_types(log, "j")] == ["0-1", "1-0", "2-0", "3-0", "4-0"]


async def test_renewed_lease_is_not_taken_over(
    queue: JobQueue, leases: JobLeases, other_leases: JobLeases
) -> None:
    await submit(queue, "j")
    delivery = await take(leases)
    for _ in range(5):
        await asyncio.sleep(0.03)
        assert await leases.renew([delivery]) == [True]
        assert await other_leases.take_over(lease_s=30, may_be_suspect=True) is None


async def test_two_claimants_get_one_delivery(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    await submit(queue, "j")
    await take(leases)
    await asyncio.sleep(LEASE_S)
    claims = await asyncio.gather(
        *(
            leases_of(redis, keys, f"w{i}").take_over(lease_s=LEASE_S, may_be_suspect=True)
            for i in range(8)
        )
    )
    assert sum(claim is not None for claim in claims) == 1


async def test_repeated_claim_gives_the_same_delivery(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    """As when the connection is lost before the reply, and the client sends the script again."""
    for job_id in ("a", "b"):
        await submit(queue, job_id)
        await start(leases)
    scripts = Scripts(redis, keys.prefix)
    no_lease_ms = suspect_idle_ms = 0

    async def claim(take_id: str) -> list[Any]:
        limits = (no_lease_ms, suspect_idle_ms)
        reply: list[Any] = await scripts.run(
            "claim", MODEL, "worker-b", take_id, *limits, "{}", 60_000
        )
        return reply

    first = await claim("one")
    assert first[1][:2] == [b"a", b"2"]
    assert await claim("one") == first
    assert (await queue.get("a")).state is JobState.RUNNING
    assert (await redis.hmget(keys.job("a"), "attempt", "deliveries")) == [b"2", b"2"]
    assert await redis.xlen(keys.dead) == 0


async def test_suspects_are_left_alone_by_who_has_one(
    queue: JobQueue, leases: JobLeases, other_leases: JobLeases
) -> None:
    for job_id in ("a", "b"):
        await submit(queue, job_id)
        await start(leases)
    suspect = await take_over(other_leases)
    assert suspect.is_suspect
    assert await other_leases.take_over(lease_s=LEASE_S, may_be_suspect=False) is None
    assert (await take_over(leases)).job_id != suspect.job_id


async def test_handing_back_costs_no_delivery(
    queue: JobQueue, leases: JobLeases, other_leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    await submit(queue, "j")
    delivery = await take(leases)
    for i in range(4):
        await say(leases, delivery, i)
        assert await leases.hand_back(delivery, lease_s=LEASE_S)
        assert not await leases.hand_back(delivery, lease_s=LEASE_S)
        record = await queue.get("j")
        assert (record.state, record.position) == (JobState.QUEUED, 0)
        delivery = await other_leases.take_over(lease_s=600, may_be_suspect=False)
        assert delivery is not None
        assert (delivery.attempt, delivery.is_suspect) == (i + 2, False)
        leases, other_leases = other_leases, leases
    assert delivery.published_token_ids == (100, 101, 102, 103)


async def test_handing_back_from_an_engine_that_failed_makes_a_suspect(
    queue: JobQueue, leases: JobLeases, other_leases: JobLeases
) -> None:
    await submit(queue, "j")
    assert await leases.hand_back(await start(leases), lease_s=600, crew=1)
    assert await other_leases.take_over(lease_s=600, may_be_suspect=False) is None
    suspect = await other_leases.take_over(lease_s=600, may_be_suspect=True)
    assert suspect is not None and suspect.is_suspect
    assert await other_leases.hand_back(suspect, lease_s=600, crew=1)
    assert await leases.take_over(lease_s=600, may_be_suspect=True) is None
    assert (await queue.get("j")).state is JobState.ERROR


async def test_suspect_that_is_handed_back_is_left_to_idle_workers_for_a_while(
    queue: JobQueue, leases: JobLeases, other_leases: JobLeases
) -> None:
    await submit(queue, "j")
    assert await leases.hand_back(await start(leases), lease_s=600, crew=1)
    busy = await other_leases.take_over(lease_s=600, may_be_suspect=True, suspect_idle_s=602)
    assert busy is None
    assert await other_leases.take_over(lease_s=600, may_be_suspect=True)


async def test_job_that_was_set_aside_says_so_to_the_next_worker_alone(
    queue: JobQueue, leases: JobLeases, other_leases: JobLeases
) -> None:
    await submit(queue, "j")
    delivery = await take(leases)
    for is_set_aside in (True, False, True, False):
        assert await leases.hand_back(delivery, lease_s=600, is_set_aside=is_set_aside)
        taken = await leases.take_over(lease_s=600, may_be_suspect=False)
        assert taken is not None and taken.was_set_aside is is_set_aside
        delivery = taken
    assert await leases.hand_back(delivery, lease_s=600, is_set_aside=True)
    assert await other_leases.take_over(lease_s=LEASE_S, may_be_suspect=False)
    await asyncio.sleep(LEASE_S)
    assert not (await take_over(leases)).was_set_aside  # its worker was lost since


async def test_cancelled_after_hand_back_leaves_nothing(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    await submit(queue, "j")
    assert await leases.hand_back(await take(leases), lease_s=LEASE_S)
    assert await queue.end("j", JobState.CANCELLED, cancelled("j"))
    assert await entries(redis, keys) == (0, 0)
    assert await leases.take_over(lease_s=600, may_be_suspect=True) is None


async def test_gap_in_the_answer_is_reported_and_not_written(
    queue: JobQueue, leases: JobLeases, log: EventLog
) -> None:
    await submit(queue, "j")
    delivery = await take(leases)
    await say(leases, delivery, 0)
    final = ErrorEvent(code="x", message="x", retryable=False, job_id="j")
    appended = (await leases.append([Append(delivery, [token(2)], final)]))[0]
    assert (appended.is_accepted, appended.next_index) == (True, 1)
    assert (await queue.get("j")).state is JobState.RUNNING
    appended = (await leases.append([Append(delivery, [token(1), token(2)], final)]))[0]
    assert appended.next_index == 3
    assert (await queue.get("j")).state is JobState.ERROR


async def test_first_token_time_is_kept_across_attempts(
    queue: JobQueue, leases: JobLeases, other_leases: JobLeases
) -> None:
    await submit(queue, "j")
    delivery = await take(leases)
    await leases.append([Append(delivery, [token(0)], first_token_at_s=1000.5)])
    await leases.append([Append(delivery, [token(1)], first_token_at_s=2000.5)])
    assert (await take_over(other_leases)).first_token_at_s == 1000.5


async def test_sampler_version_is_that_of_the_published_tokens(
    queue: JobQueue, leases: JobLeases, other_leases: JobLeases
) -> None:
    await submit(queue, "j")
    delivery = await take(leases)
    assert delivery.sampler_version is None
    await leases.append([Append(delivery, [StatusEvent(stage="prefilling")])])
    assert await leases.hand_back(delivery, lease_s=LEASE_S)
    delivery = await take_over(other_leases)
    assert delivery.sampler_version is None
    await other_leases.append([Append(delivery, [token(0)])])
    assert (await take_over(leases)).sampler_version == SAMPLER_VERSION


async def test_unreadable_request_ends_its_job_and_not_the_worker(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    await submit(queue, "bad")
    await redis.hset(keys.job("bad"), "request", "{}")
    await redis.xadd(keys.jobs(MODEL), {"stray": "entry"})
    await submit(queue, "good")
    assert await leases.take(block_s=1) is None
    assert await leases.take(block_s=1) is None
    assert (await take(leases)).job_id == "good"
    assert await redis.hget(keys.job("bad"), "state") == b"error"
    assert await entries(redis, keys) == (1, 1)


async def test_lost_group_is_made_anew_and_running_jobs_are_fenced(
    queue: JobQueue, leases: JobLeases, other_leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    await submit(queue, "j")
    first = await take(leases)
    await redis.xgroup_destroy(keys.jobs(MODEL), GROUP)
    assert await other_leases.take_over(lease_s=LEASE_S, may_be_suspect=True) is None
    second = await take(other_leases)
    assert (second.job_id, second.attempt, second.is_suspect) == ("j", 2, False)
    assert await say(leases, first, 0) == (False, 0)
    await redis.delete(keys.jobs(MODEL))
    assert await leases.take(block_s=0.05) is None
    await submit(queue, "k")
    assert (await take(leases)).job_id == "k"


async def test_consumers_of_dead_processes_are_forgotten(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    gone = leases_of(redis, keys, "gone")
    await submit(queue, "i")
    await finish(gone, await take(gone))
    await submit(queue, "j")
    await take(leases)
    await asyncio.sleep(0.05)
    assert await Scripts(redis, keys.prefix).run("forget_consumers", MODEL, 10) == 1
    names = [c["name"] for c in await redis.xinfo_consumers(keys.jobs(MODEL), GROUP)]
    assert names == [b"worker-a"]


# --- outages ---


async def test_unreachable_store_raises_one_clear_error(keys: RedisKeys) -> None:
    client = connect("unix:///nonexistent/redis.sock")
    queue = JobQueue(client, keys, result_ttl_s=60)
    with pytest.raises(StoreUnavailableError):
        await queue.reserve(MODEL, "j", max_jobs=1, lease_s=1)
    with pytest.raises(StoreUnavailableError):
        await queue.get("j")
    with pytest.raises(StoreUnavailableError):
        await leases_of(client, keys, "w").take(block_s=0.01)
    with pytest.raises(StoreUnavailableError):
        async with aclosing(leases_of(client, keys, "w").ended()) as ended:
            await anext(ended)
    await client.aclose()


# --- one call for many jobs ---


async def test_job_that_is_lost_does_not_stop_the_others(
    queue: JobQueue, leases: JobLeases, log: EventLog
) -> None:
    deliveries = []
    for job_id in ("a", "b", "c"):
        await submit(queue, job_id)
        deliveries.append(await take(leases))
    assert await queue.end("b", JobState.CANCELLED, cancelled("b"))
    a, b, c = await leases.append([Append(d, [token(0)]) for d in deliveries])
    assert (a.is_accepted, b.is_accepted, c.is_accepted) == (True, False, True)
    assert (a.next_index, c.next_index) == (1, 1)
    for job_id, expected in (("a", "token"), ("b", "error"), ("c", "token")):
        assert (await log.read(job_id))[-1].type == expected


async def test_job_whose_log_is_broken_does_not_stop_the_others(
    queue: JobQueue, leases: JobLeases, log: EventLog, redis: Redis, keys: RedisKeys
) -> None:
    deliveries = []
    for job_id in ("a", "b", "c"):
        await submit(queue, job_id)
        deliveries.append(await take(leases))
    await redis.set(keys.events("b"), "no stream")
    a, b, c = await leases.append([Append(d, [token(0)]) for d in deliveries])
    assert a.error is None and c.error is None
    assert not b.is_accepted and b.error is not None and "WRONGTYPE" in b.error
    for job_id in ("a", "c"):
        assert (await log.read(job_id))[-1].event == token(0)


async def test_more_jobs_than_fit_one_call_are_appended_to_and_renewed(
    queue: JobQueue, leases: JobLeases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_leases, "MAX_JOBS_PER_CALL", 2)
    deliveries = []
    for number in range(5):
        await submit(queue, f"j{number}")
        deliveries.append(await take(leases))
    appended = await leases.append([Append(d, [token(0), token(1)]) for d in deliveries])
    assert [reply.next_index for reply in appended] == [2] * 5
    assert await queue.end("j3", JobState.CANCELLED, cancelled("j3"))
    assert await leases.renew(deliveries) == [True, True, True, False, True]


async def test_texts_of_any_kind_reach_the_log_as_they_are(
    queue: JobQueue, leases: JobLeases, log: EventLog
) -> None:
    await submit(queue, "j")
    delivery = await take(leases)
    texts = ["\n", "\r\n a b", "", '"\\', "\u2028\u0000\x85", "  - {} "]
    events = [TokenEvent(index=i, text=text, token_ids=[i]) for i, text in enumerate(texts)]
    assert (await leases.append([Append(delivery, events)]))[0].next_index == len(texts)
    logged = await log.read("j", after="0-1")
    assert [entry.event for entry in logged] == events
    assert not any(b"\n" in entry.data or b"\r" in entry.data for entry in logged)


async def test_append_to_a_full_redis_is_tried_again(
    own_redis_server: RedisServer, keys: RedisKeys
) -> None:
    redis = connect(own_redis_server.url)
    queue = JobQueue(redis, keys, result_ttl_s=60)
    leases = leases_of(redis, keys, "w")
    await leases.ensure_group()
    await submit(queue, "j")
    delivery = await take(leases)
    await redis.config_set("maxmemory", 1)
    with pytest.raises(StoreUnavailableError):
        await leases.append([Append(delivery, [token(0)])])
    await redis.config_set("maxmemory", 0)
    assert (await leases.append([Append(delivery, [token(0)])]))[0] == (True, 1, False, None)
    await redis.aclose()
