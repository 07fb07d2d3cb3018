"""Which jobs are blamed for the loss of a worker, and when the blame is taken back."""

import asyncio

import pytest
from redis.asyncio import Redis

from app.messages import ErrorEvent, JobState
from app.store.event_log import EventLog
from app.store.job_leases import Append, Delivery, JobLeases
from app.store.job_queue import Idempotency, JobQueue
from app.store.keys import RedisKeys
from app.store.lost_workers import Fate, LostWorkers
from tests.integration.jobs import (
    LEASE_S,
    MODEL,
    leases_of,
    make_request,
    submit,
    take,
    take_over,
    token,
    with_frames,
)

MAX_DELIVERIES = 8


class Fleet:
    """Workers that come and go; none of them ever renews a lease."""

    def __init__(self, redis: Redis, keys: RedisKeys, queue: JobQueue) -> None:
        self._redis = redis
        self._keys = keys
        self._queue = queue
        self._number = 0

    async def worker(self) -> JobLeases:
        self._number += 1
        leases = leases_of(self._redis, self._keys, f"worker-{self._number}")
        await leases.ensure_group()
        return leases

    async def start_job(self) -> tuple[JobLeases, Delivery]:
        """A worker takes a new job, "j", and gives it to its engine."""
        await submit(self._queue, "j")
        leases = await self.worker()
        return leases, await start(leases)

    async def fail_over(self) -> tuple[JobLeases, Delivery]:
        """A fresh worker takes over what the last one left, and gives it to its engine."""
        leases = await self.worker()
        async with asyncio.timeout(20):
            delivery = await take_over(leases)
        assert await leases.enter(delivery)
        return leases, delivery

    async def report(self, delivery: Delivery, fate: Fate) -> int:
        """Says how this delivery's worker ended."""
        lost = LostWorkers(self._redis, self._keys)
        return await lost.report(delivery.worker_id, fate, lease_s=LEASE_S)

    async def blame(self, job_id: str = "j") -> tuple[int, int, bool]:
        """Deaths, deliveries and whether it is a suspect."""
        names = ("deaths", "deliveries", "is_suspect")
        deaths, deliveries, is_suspect = await self._redis.hmget(self._keys.job(job_id), *names)
        return int(deaths or 0), int(deliveries), is_suspect == b"1"


@pytest.fixture
def fleet(redis: Redis, keys: RedisKeys, queue: JobQueue) -> Fleet:
    return Fleet(redis, keys, queue)


async def start(leases: JobLeases) -> Delivery:
    delivery = await take(leases)
    assert await leases.enter(delivery)
    return delivery


async def say(leases: JobLeases, delivery: Delivery, *indices: int) -> bool:
    appended = await leases.append([Append(delivery, [token(i) for i in indices])])
    return appended[0].is_accepted


async def last_error(log: EventLog, job_id: str) -> ErrorEvent:
    async with asyncio.timeout(20):
        while True:
            event = (await log.read(job_id))[-1].event
            if isinstance(event, ErrorEvent):
                return event


async def wait_for_end(fleet: Fleet, queue: JobQueue, job_id: str) -> None:
    leases = await fleet.worker()
    async with asyncio.timeout(20):
        while not (await queue.get(job_id)).state.is_final:
            assert await leases.take_over(lease_s=LEASE_S, may_be_suspect=True) is None
            await asyncio.sleep(0.02)


async def test_second_death_alone_ends_the_job_for_good(
    fleet: Fleet, queue: JobQueue, log: EventLog, redis: Redis, keys: RedisKeys
) -> None:
    await fleet.start_job()
    _, second = await fleet.fail_over()
    assert (second.attempt, second.is_suspect) == (2, True)
    await wait_for_end(fleet, queue, "j")
    last = await last_error(log, "j")
    assert (last.code, last.retryable) == ("job_failed_repeatedly", False)
    (_, letter), *others = await redis.xrange(keys.dead)
    assert letter[b"job_id"] == b"j" and letter[b"deaths"] == b"2" and not others
    assert await redis.xlen(keys.jobs(MODEL)) == 0


async def test_deaths_with_several_in_the_engine_count_against_none(
    fleet: Fleet, queue: JobQueue
) -> None:
    for job_id in ("a", "b", "c"):
        await submit(queue, job_id)
    worker = await fleet.worker()
    for _ in range(3):
        await start(worker)
    for _ in range(4):
        worker = await fleet.worker()
        taken = []
        async with asyncio.timeout(20):
            while len(taken) < 3:
                taken.append(await take_over(worker))
        assert all(delivery.is_suspect for delivery in taken)
        for delivery in taken:
            assert await worker.enter(delivery)
    for job_id in ("a", "b", "c"):
        assert (await queue.get(job_id)).state is JobState.RUNNING


async def test_claims_by_several_workers_see_one_crew(
    fleet: Fleet, queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    """The second job to be claimed is not alone because the first has gone already."""
    for job_id in ("a", "b"):
        await submit(queue, job_id)
    worker = await fleet.worker()
    for _ in range(2):
        await start(worker)
    await fleet.fail_over()
    await fleet.fail_over()
    for job_id in ("a", "b"):
        assert await redis.hget(keys.job(job_id), "deaths") is None


async def test_death_before_the_engine_has_the_job_costs_nothing(
    fleet: Fleet, queue: JobQueue
) -> None:
    await submit(queue, "j")
    delivery = await take(await fleet.worker())
    for attempt in range(2, MAX_DELIVERIES + 4):
        delivery = await take_over(await fleet.worker())
        assert (delivery.attempt, delivery.is_suspect) == (attempt, False)


async def test_job_that_was_loading_is_no_suspect_of_its_neighbours_death(
    fleet: Fleet, queue: JobQueue
) -> None:
    for job_id in ("runs", "loads"):
        await submit(queue, job_id)
    worker = await fleet.worker()
    await start(worker)
    await take(worker)
    taken = [await take_over(await fleet.worker()) for _ in range(2)]
    assert {d.job_id: d.is_suspect for d in taken} == {"runs": True, "loads": False}


async def test_fenced_worker_that_comes_back_gives_the_delivery_back(fleet: Fleet) -> None:
    """The link to Redis is cut again and again: no worker died."""
    away, delivery = await fleet.start_job()
    for _ in range(MAX_DELIVERIES + 2):
        back, earlier = away, delivery
        away, delivery = await fleet.fail_over()
        assert delivery.is_suspect
        assert await back.renew([earlier]) == [False]
    assert await say(away, delivery, 0)


async def test_append_of_a_fenced_worker_proves_that_it_lives_too(
    fleet: Fleet, redis: Redis, keys: RedisKeys
) -> None:
    first, delivery = await fleet.start_job()
    await fleet.fail_over()
    assert await redis.hget(keys.job("j"), "deaths") == b"1"
    for _ in range(2):  # the client may send it twice
        assert not await say(first, delivery, 0)
    blame = await redis.hmget(keys.job("j"), "deaths", "losses", "deliveries", "is_suspect")
    assert blame == [b"0", b"0", b"1", b"0"]


async def test_worker_that_comes_back_before_its_job_is_taken_is_acquitted(
    fleet: Fleet, redis: Redis, keys: RedisKeys
) -> None:
    """Judged by a worker that left the suspect to others."""
    first, delivery = await fleet.start_job()
    await asyncio.sleep(LEASE_S)
    busy = await fleet.worker()
    assert await busy.take_over(lease_s=LEASE_S, may_be_suspect=False) is None
    assert await first.renew([delivery]) == [True]
    blame = await redis.hmget(keys.job("j"), "deaths", "losses", "deliveries", "is_suspect")
    assert blame == [b"0", b"0", b"1", b"0"]


async def test_own_job_is_taken_up_again_at_no_cost(fleet: Fleet) -> None:
    leases, _ = await fleet.start_job()
    for _ in range(MAX_DELIVERIES + 2):
        delivery = await take_over(leases)
        assert not delivery.is_suspect
        assert await leases.enter(delivery)


async def test_suspect_is_cleared_by_going_on_alone(fleet: Fleet) -> None:
    leases, delivery = await fleet.start_job()
    assert await say(leases, delivery, *range(4))
    leases, delivery = await fleet.fail_over()
    appended = await leases.append([Append(delivery, [token(i) for i in range(4, 8)])])
    assert appended[0].is_suspect
    appended = await leases.append([Append(delivery, [token(i) for i in range(8, 24)])])
    assert appended[0].is_accepted and not appended[0].is_suspect
    await leases.hand_back(delivery, lease_s=LEASE_S)
    assert not (await take_over(await fleet.worker())).is_suspect


async def test_upper_bound_ends_retryable_and_frees_the_key(
    fleet: Fleet, queue: JobQueue, log: EventLog
) -> None:
    key = Idempotency(key_hash="h", fingerprint="f", ttl_s=60)

    async def post(job_id: str) -> str:
        await queue.reserve(MODEL, job_id, max_jobs=100, lease_s=30)
        return (await queue.create(make_request(job_id), idempotency=key)).job_id

    assert await post("j") == "j"
    assert await queue.enqueue(with_frames(make_request("j")))
    await submit(queue, "k")
    worker = await fleet.worker()
    for _ in range(2):
        await start(worker)
    for _ in range(MAX_DELIVERIES - 1):
        worker = await fleet.worker()
        for _ in range(2):
            assert await worker.enter(await take_over(worker))
    assert await post("again") == "j"
    for job_id in ("j", "k"):
        await wait_for_end(fleet, queue, job_id)
        last = await last_error(log, job_id)
        assert (last.code, last.retryable) == ("workers_lost", True)
    assert await post("anew") == "anew"


async def test_worker_that_was_killed_from_outside_charges_nobody(fleet: Fleet) -> None:
    _, delivery = await fleet.start_job()
    for number in range(2, MAX_DELIVERIES):
        await fleet.report(delivery, Fate.OUTSIDE)
        _, delivery = await fleet.fail_over()
        assert (delivery.attempt, delivery.is_suspect) == (number, False)
        assert await fleet.blame() == (0, number, False)


async def test_jobs_of_a_worker_whose_end_was_seen_do_not_wait_for_their_leases(
    fleet: Fleet, queue: JobQueue
) -> None:
    for job_id in ("a", "b"):
        await submit(queue, job_id)
    worker = await fleet.worker()
    deliveries = [await start(worker) for _ in range(2)]
    assert await fleet.report(deliveries[0], Fate.OUTSIDE) == 2
    other = await fleet.worker()
    taken = [await other.take_over(lease_s=600, may_be_suspect=False) for _ in range(2)]
    assert [delivery and delivery.job_id for delivery in taken] == ["a", "b"]


async def test_crash_charges_a_job_that_was_alone_however_far_it_had_got(
    fleet: Fleet, queue: JobQueue, log: EventLog
) -> None:
    worker, delivery = await fleet.start_job()
    assert await say(worker, delivery, *range(30))
    await fleet.report(delivery, Fate.OWN)
    worker, delivery = await fleet.fail_over()
    assert await fleet.blame() == (1, 2, True)
    assert await say(worker, delivery, *range(30, 60))
    await fleet.report(delivery, Fate.OWN)
    await wait_for_end(fleet, queue, "j")
    assert (await last_error(log, "j")).code == "job_failed_repeatedly"


async def test_death_that_nobody_saw_charges_no_job_that_had_got_further(fleet: Fleet) -> None:
    """A container that went: a job that kills workers would have done so at the same place."""
    worker, delivery = await fleet.start_job()
    for number in range(2, MAX_DELIVERIES):
        first = delivery.published[-1].next_index if delivery.published else 0
        assert await say(worker, delivery, *range(first, first + 4))
        worker, delivery = await fleet.fail_over()
        assert await fleet.blame() == (0, number, True)


async def test_crash_that_is_heard_of_late_is_charged_late(fleet: Fleet) -> None:
    worker, delivery = await fleet.start_job()
    assert await say(worker, delivery, *range(5))
    await fleet.fail_over()
    assert await fleet.blame() == (0, 2, True)
    for _ in range(2):
        await fleet.report(delivery, Fate.OWN)
        assert await fleet.blame() == (1, 2, True)


async def test_charge_is_taken_back_when_it_turns_out_that_somebody_killed_the_worker(
    fleet: Fleet,
) -> None:
    """Its lease ran out, because it was stopped or its supervisor could not reach Redis."""
    _, delivery = await fleet.start_job()
    await fleet.fail_over()
    assert await fleet.blame() == (1, 2, True)
    for _ in range(2):
        await fleet.report(delivery, Fate.OUTSIDE)
        assert await fleet.blame() == (0, 2, False)


async def test_crash_with_several_in_the_engine_makes_suspects_at_once(
    fleet: Fleet, queue: JobQueue
) -> None:
    for job_id in ("a", "b"):
        await submit(queue, job_id)
    worker = await fleet.worker()
    deliveries = [await start(worker) for _ in range(2)]
    await fleet.report(deliveries[0], Fate.OWN)
    for job_id in ("a", "b"):
        assert await fleet.blame(job_id) == (0, 1, True)
