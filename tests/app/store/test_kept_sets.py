"""Kept sets on a real Redis: stored with the job, fenced, and deleted with it."""

import asyncio
from hashlib import sha1

import pytest
from redis.asyncio import Redis

from app.messages import JobState
from app.store.client import load_script, shared_connection
from app.store.job_queue import JobQueue
from app.store.kept_sets import KeptSets
from app.store.keys import RedisKeys
from dycoke_core.kept_sets import MAX_HISTORY_BYTES
from tests.integration.jobs import cancelled, leases_of, submit, take, take_over


async def test_sets_live_as_long_as_the_job_and_count_among_its_bytes(
    redis: Redis, keys: RedisKeys, queue: JobQueue, sets: KeptSets
) -> None:
    leases = leases_of(redis, keys, "a")
    await leases.ensure_group()
    sizes = {}
    for job_id, blob in (("with", b"x" * 50_000), ("without", None)):
        await submit(queue, job_id)
        delivery = await take(leases)
        if blob is not None:
            assert await sets.put(delivery, blob)
        assert await queue.end(job_id, JobState.CANCELLED, cancelled(job_id))
        sizes[job_id] = int(await redis.hget(keys.ended_sizes, job_id) or 0)
    assert await sets.get("with") == b"x" * 50_000 and await sets.get("without") is None
    assert 50_000 < sizes["with"] - sizes["without"] < 60_000 + 4096
    ttl_of_job_ms = await redis.pttl(keys.job("with"))
    assert 0 < await redis.pttl(keys.kept("with")) <= ttl_of_job_ms + 100


async def test_sets_go_with_the_job_that_makes_room_for_newer_ones(
    redis: Redis, keys: RedisKeys, queue: JobQueue, sets: KeptSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = "MAX_ENDED_BYTES = 256 * 1024 * 1024"

    def load_small(name: str) -> tuple[str, str]:
        source, _ = load_script(name)
        assert budget in source or name not in ("append", "end")
        source = source.replace(budget, "MAX_ENDED_BYTES = 150000")
        return source, sha1(source.encode(), usedforsecurity=False).hexdigest()

    monkeypatch.setattr("app.store.client.load_script", load_small)
    leases = leases_of(redis, keys, "a")
    await leases.ensure_group()
    for job_id in "abc":
        await submit(queue, job_id)
        assert await sets.put(await take(leases), b"x" * 60_000)
        assert await queue.end(job_id, JobState.CANCELLED, cancelled(job_id))
    left = [job_id for job_id in "abc" if await sets.get(job_id) is not None]
    assert (
        left == [job_id for job_id in "abc" if await redis.exists(keys.job(job_id))] == ["b", "c"]
    )


async def test_a_worker_whose_lease_is_another_ones_stores_nothing(
    redis: Redis, keys: RedisKeys, queue: JobQueue, sets: KeptSets
) -> None:
    first, second = leases_of(redis, keys, "a"), leases_of(redis, keys, "b")
    await first.ensure_group()
    await submit(queue, "job")
    lost = await take(first)
    held = await take_over(second)
    assert await sets.put(held, b"held")
    assert not await sets.put(lost, b"lost")
    assert await sets.get("job") == b"held"
    await queue.end("job", JobState.CANCELLED, cancelled("job"))
    assert not await sets.put(held, b"late")


async def test_what_redis_cannot_store_fails_nobody(
    redis: Redis, keys: RedisKeys, queue: JobQueue, sets: KeptSets
) -> None:
    leases = leases_of(redis, keys, "a")
    await leases.ensure_group()
    await submit(queue, "job")
    delivery = await take(leases)
    await redis.delete(keys.job("job"))
    await redis.set(keys.job("job"), "no hash")
    assert not await sets.put(delivery, b"x")


async def test_sets_are_stored_while_frames_are_on_their_way(
    redis: Redis, keys: RedisKeys, queue: JobQueue, sets: KeptSets
) -> None:
    """All of a worker's answers wait while one job's sets are stored."""
    leases = leases_of(redis, keys, "a")
    await leases.ensure_group()
    await submit(queue, "job")
    delivery = await take(leases)
    large = shared_connection(redis, "large")
    transfer = asyncio.create_task(large.call("BLPOP", f"{keys.prefix}:never", 30))
    await asyncio.sleep(0)
    try:
        assert await sets.put(delivery, b"x" * MAX_HISTORY_BYTES)
    finally:
        transfer.cancel()
        await asyncio.gather(transfer, return_exceptions=True)
