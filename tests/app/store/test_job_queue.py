"""The life of a job on a real Redis: transitions, bounds, leases, fencing, failover."""

import asyncio
import time
from collections import Counter
from contextlib import aclosing
from hashlib import sha1

import pytest
from redis.asyncio import Redis

from app.errors import (
    IdempotencyConflictError,
    JobNotFoundError,
    QueueFullError,
    StoreUnavailableError,
)
from app.messages import ErrorEvent, JobState, StatusEvent
from app.store.client import connect, load_script
from app.store.event_log import EventLog
from app.store.job_leases import JobLeases
from app.store.job_queue import MAX_ADOPTIONS, Idempotency, JobQueue, Orphan
from app.store.keys import RedisKeys
from tests.integration.jobs import (
    LEASE_S,
    MODEL,
    cancelled,
    entries,
    event_types,
    finish,
    leases_of,
    make_request,
    say,
    submit,
    take,
    with_frames,
)

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
        async with asyncio.timeout(20):
            while (job_id := await anext(ended)) is None:
                pass
        assert job_id == "j"
    assert await entries(redis, keys) == (0, 0)
    assert await say(leases, delivery, 1) == (False, 1)
    assert not await finish(leases, delivery)
    assert await leases.renew([delivery]) == [False]
    assert not await leases.hand_back(delivery, lease_s=LEASE_S)
    assert await event_types(log, "j") == [("0-1", "job"), ("1-0", "token"), ("2-0", "error")]


async def test_worker_listens_once_redis_says_so(leases: JobLeases, redis: Redis) -> None:
    pause_s = 0.3
    await redis.client_pause(int(pause_s * 1000))
    began_at = time.monotonic()
    async with aclosing(leases.ended()) as ended:
        assert await anext(ended) is None
    assert time.monotonic() - began_at >= pause_s / 2


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


async def test_job_whose_post_was_cancelled_while_it_was_created_finds_a_reader(
    queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    """A shutdown cancels a post that waits for Redis, which then hears of the job and, right after
    it, that the post gives its place up."""
    await queue.reserve(MODEL, "j", max_jobs=1, lease_s=0.0)
    await queue.create(make_request("j"))
    await queue.release(MODEL, "j")
    orphan = Orphan(MODEL, "j")
    assert (await queue.sweep()).orphans == (orphan,)
    assert await queue.adopt(orphan, lease_s=30) is not None
    assert await queue.end("j", JobState.CANCELLED, cancelled("j"))
    assert (await queue.depth(MODEL)).places == 0


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


async def check_count_by_owner(redis: Redis, keys: RedisKeys) -> None:
    sizes = await redis.hgetall(keys.ended_sizes)
    by_owner = Counter[bytes]()
    for job_id, noted in (await redis.hgetall(keys.ended_of_jobs)).items():
        num_bytes, owner = noted.split()
        assert num_bytes == sizes[job_id]
        assert await redis.zscore(keys.ended_of(owner.decode()), job_id) is not None
        by_owner[owner] += int(num_bytes)
    assert by_owner.total() == sum(map(int, sizes.values()))
    assert dict(await redis.zrange(keys.ended_owners, 0, -1, withscores=True)) == by_owner


def load_small(name: str) -> tuple[str, str]:
    """A script with little room for ended jobs."""
    budget = "MAX_ENDED_BYTES = 256 * 1024 * 1024"
    source, _ = load_script(name)
    assert budget in source or name not in ("append", "end")
    source = source.replace(budget, "MAX_ENDED_BYTES = 60000")
    return source, sha1(source.encode(), usedforsecurity=False).hexdigest()


async def end_large(queue: JobQueue, job_id: str, owner: str = "anonymous") -> None:
    await queue.reserve(MODEL, job_id, max_jobs=100, lease_s=30)
    request = make_request(job_id)
    long = [request.messages[0].model_copy(update={"content": "x" * 20_000})]
    await queue.create(request.model_copy(update={"messages": long, "owner": owner}))
    assert await queue.end(job_id, JobState.CANCELLED, cancelled(job_id))


async def test_oldest_ended_jobs_make_room_for_newer_ones(
    queue: JobQueue,
    leases: JobLeases,
    log: EventLog,
    redis: Redis,
    keys: RedisKeys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.store.client.load_script", load_small)
    await submit(queue, "r")
    running = await take(leases)
    await submit(queue, "q")
    for job_id in "abcd":
        await end_large(queue, job_id)
    assert await left_behind(redis, keys, "abcdrq") == ["c", "d", "r", "q"]
    await check_count_of_ended(redis, keys, "c", "d")
    await check_count_by_owner(redis, keys)
    with pytest.raises(JobNotFoundError):
        await queue.get("a")
    with pytest.raises(JobNotFoundError):
        await log.read("a")
    with pytest.raises(JobNotFoundError):
        await queue.end("a", JobState.CANCELLED, cancelled("a"))
    assert await say(leases, running, 0) == (True, 1)
    assert await finish(leases, running)
    assert (await take(leases)).job_id == "q"


async def test_who_ends_many_jobs_makes_room_with_its_own(
    queue: JobQueue, redis: Redis, keys: RedisKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.store.client.load_script", load_small)
    await end_large(queue, "z", "key_quiet")
    for job_id in "abcd":
        await end_large(queue, job_id, "key_busy")
    assert await left_behind(redis, keys, "zabcd") == ["z", "d"]
    await check_count_of_ended(redis, keys, "z", "d")
    await check_count_by_owner(redis, keys)


async def test_jobs_that_the_previous_release_has_dropped_are_counted_no_longer(
    redis: Redis, keys: RedisKeys, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.store.client.load_script", load_small)
    for job_id in "ab":
        await end_large(queue, job_id, "key_busy")
    size = int(await redis.hget(keys.ended_sizes, "a") or 0)
    await redis.zrem(keys.ended_jobs, "a")
    await redis.hdel(keys.ended_sizes, "a")
    await redis.decrby(keys.ended_bytes, size)
    for job_id in "cd":
        await end_large(queue, job_id, "key_busy")
    await check_count_of_ended(redis, keys, "c", "d")
    await check_count_by_owner(redis, keys)


async def test_ended_jobs_are_counted_for_as_long_as_they_are_kept(
    leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    fleeting = JobQueue(redis, keys, result_ttl_s=0.01)
    for job_id in "ab":
        await submit(fleeting, job_id)
        assert await fleeting.end(job_id, JobState.CANCELLED, cancelled(job_id))
        await asyncio.sleep(0.02)  # longer than it is kept
    await check_count_of_ended(redis, keys, "b")


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
