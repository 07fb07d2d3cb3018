"""Jobs of a worker whose end was seen: free at once, and blamed as its end suggests."""

import pytest
from redis.asyncio import Redis

from app.messages import JobState
from app.store.job_leases import JobLeases
from app.store.job_queue import JobQueue
from app.store.keys import RedisKeys
from app.store.lost_workers import Fate, LostWorkers
from app.store.worker_registry import WorkerRegistry
from tests.cards import model_card
from tests.integration.jobs import say, start, submit

LONG_LEASE_S = 600.0


@pytest.fixture
def lost(redis: Redis, keys: RedisKeys) -> LostWorkers:
    return LostWorkers(redis, keys)


async def test_a_worker_that_held_nothing_is_withdrawn(
    redis: Redis, keys: RedisKeys, leases: JobLeases, lost: LostWorkers
) -> None:
    registry = WorkerRegistry(redis, keys)
    await registry.publish(model_card("worker-a"), 60)
    assert await lost.report("worker-a", Fate.UNKNOWN, lease_s=LONG_LEASE_S) == 0
    assert await registry.cards() == []
    assert await lost.report("never was", Fate.OWN, lease_s=LONG_LEASE_S) == 0


@pytest.mark.parametrize("fate", list(Fate))
async def test_jobs_are_free_before_their_leases_are_over(
    fate: Fate, queue: JobQueue, leases: JobLeases, other_leases: JobLeases, lost: LostWorkers
) -> None:
    for job_id in ("i", "j"):
        await submit(queue, job_id)
        delivery = await start(leases)
        assert await say(leases, delivery, 0) == (True, 1)
    assert await other_leases.take_over(lease_s=LONG_LEASE_S, may_be_suspect=True) is None
    assert await lost.report("worker-a", fate, lease_s=LONG_LEASE_S) == 2
    taken = set()
    for _ in range(2):
        delivery_again = await other_leases.take_over(lease_s=LONG_LEASE_S, may_be_suspect=True)
        assert delivery_again is not None and delivery_again.attempt == 2
        assert [event.token_ids for event in delivery_again.published] == [[100]]
        taken.add(delivery_again.job_id)
    assert taken == {"i", "j"}
    assert not (await say(leases, delivery, 1))[0], "the lost one is refused"


@pytest.mark.parametrize(("fate", "is_suspect"), [(Fate.OWN, True), (Fate.OUTSIDE, False)])
async def test_a_job_is_suspect_where_its_worker_ended_by_itself(
    fate: Fate,
    is_suspect: bool,
    queue: JobQueue,
    leases: JobLeases,
    other_leases: JobLeases,
    lost: LostWorkers,
) -> None:
    await submit(queue, "j")
    await start(leases)
    await lost.report("worker-a", fate, lease_s=LONG_LEASE_S)
    delivery = await other_leases.take_over(lease_s=LONG_LEASE_S, may_be_suspect=True)
    assert delivery is not None and delivery.is_suspect is is_suspect
    assert (await queue.get("j")).state is JobState.RUNNING
