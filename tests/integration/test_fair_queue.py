"""Whose job is next, on a real Redis: shares by weight and cost, and that no job is lost."""

import asyncio
from collections import Counter

import pytest
from redis.asyncio import Redis

from app.keys.limits import KeyLimits
from app.messages import JobState
from app.store.client import Scripts
from app.store.job_leases import Append, Delivery, JobLeases
from app.store.job_queue import JobQueue
from app.store.keys import GROUP, RedisKeys
from app.store.owner_limits import Allowance
from dycoke_core.config import PRIORITIES, Priority
from tests.integration.api import receipt
from tests.integration.jobs import (
    LEASE_S,
    MODEL,
    cancelled,
    leases_of,
    make_request,
    take,
    take_over,
    token,
    with_frames,
)


async def ask(
    queue: JobQueue,
    owner: str,
    number: int,
    *,
    weight: float = 1.0,
    max_tokens: int = 9,
    priority: Priority = "normal",
) -> str:
    """Queues a job; its id is that of its owner, with a number."""
    job_id = f"{owner}{number}"
    request = make_request(job_id).model_copy(update={"owner": owner, "priority": priority})
    await queue.reserve(MODEL, job_id, max_jobs=1000, lease_s=30, owner=owner)
    allowance = Allowance(owner, KeyLimits(weight=weight), max_tokens=max_tokens)
    await queue.create(request, allowance=allowance)
    assert await queue.enqueue(with_frames(request))
    return job_id


async def ask_all(queue: JobQueue, **numbers: int) -> None:
    """Queues this many jobs of each owner, numbered from 0, one owner after the other."""
    for owner, num_jobs in numbers.items():
        for number in range(num_jobs):
            await ask(queue, owner, number)


async def serve(leases: JobLeases) -> str:
    """Takes the next job and answers it; returns its id."""
    delivery = await take(leases)
    await finish(leases, delivery)
    return delivery.job_id


async def finish(leases: JobLeases, delivery: Delivery) -> None:
    appended = await leases.append([Append(delivery, [token(0)], receipt(delivery, 1))])
    assert appended[0].is_accepted


async def served(leases: JobLeases, number: int) -> Counter[str]:
    """How many of the next jobs, in this number, are each owner's."""
    return Counter([(await serve(leases))[0] for _ in range(number)])


async def end(queue: JobQueue, job_id: str) -> None:
    assert await queue.end(job_id, JobState.CANCELLED, cancelled(job_id))


async def positions(queue: JobQueue, *job_ids: str) -> list[int | None]:
    return [(await queue.get(job_id)).position for job_id in job_ids]


async def assert_empty(redis: Redis, keys: RedisKeys, leases: JobLeases) -> None:
    """Nothing is left once the last tickets have been read."""
    while await redis.xlen(keys.jobs(MODEL)):
        assert await leases.take(block_s=0.01) is None
    counts = (keys.place_owners(MODEL), keys.owner_places(MODEL), keys.more_places(MODEL))
    for key in (keys.order(MODEL), keys.queued(MODEL), keys.given(MODEL), keys.live, *counts):
        assert not await redis.exists(key), key
    for kind in ("owner_jobs", "share"):
        async for key in redis.scan_iter(f"{keys.prefix}:{kind}:*"):
            raise AssertionError(key)
    assert await redis.pttl(keys.tags(MODEL)) != -1


# --- shares ---


async def test_two_keys_at_ten_to_one_get_equal_service_while_both_wait(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    await ask_all(queue, a=100, b=10)
    assert await positions(queue, "b0", "b9") == [1, 19]
    order = [await serve(leases) for _ in range(110)]
    for number in range(1, 11):
        first = Counter(job_id[0] for job_id in order[: 2 * number])
        assert first == {"a": number, "b": number}
    assert [job_id for job_id in order if job_id[0] == "a"] == [f"a{i}" for i in range(100)]
    assert [job_id for job_id in order if job_id[0] == "b"] == [f"b{i}" for i in range(10)]
    await assert_empty(redis, keys, leases)


async def test_service_is_shared_by_weight(queue: JobQueue, leases: JobLeases) -> None:
    for number in range(30):
        await ask(queue, "a", number, weight=2.0)
        await ask(queue, "b", number)
    assert await served(leases, 15) == {"a": 10, "b": 5}
    assert await served(leases, 15) == {"a": 10, "b": 5}


async def test_service_is_shared_by_cost(queue: JobQueue, leases: JobLeases) -> None:
    for number in range(30):
        await ask(queue, "a", number, max_tokens=29)  # each costs as much as three of b's
        await ask(queue, "b", number, max_tokens=9)
    shares = await served(leases, 20)
    assert shares == {"a": 5, "b": 15}


async def test_one_key_is_first_in_first_out(queue: JobQueue, leases: JobLeases) -> None:
    costs = (9, 1, 99, 5, 5, 40)
    job_ids = [await ask(queue, "a", n, max_tokens=cost) for n, cost in enumerate(costs)]
    assert await positions(queue, *job_ids) == list(range(6))
    assert [await serve(leases) for _ in job_ids] == job_ids


async def test_who_comes_late_or_back_has_saved_up_nothing(
    queue: JobQueue, leases: JobLeases
) -> None:
    await ask(queue, "b", 0)
    assert await serve(leases) == "b0"
    await ask_all(queue, a=20)
    assert await served(leases, 10) == {"a": 10}
    for number in range(1, 21):
        await ask(queue, "b", number)
    assert await served(leases, 10) == {"a": 5, "b": 5}


async def test_what_was_cancelled_while_it_waited_costs_its_key_nothing(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    await ask_all(queue, a=20, b=10)
    for number in range(18):
        await end(queue, f"a{number}")
    assert await positions(queue, "a18", "b0", "a19", "b1") == [0, 1, 2, 3]
    await ask(queue, "a", 20)
    assert (await positions(queue, "a20"))[0] == 4
    assert await served(leases, 6) == {"a": 3, "b": 3}
    assert await served(leases, 7) == {"b": 7}
    await assert_empty(redis, keys, leases)


async def test_position_is_the_number_of_jobs_that_are_taken_before(
    queue: JobQueue, leases: JobLeases
) -> None:
    for number in range(6):
        await ask(queue, "a", number)
    for number in range(3):
        await ask(queue, "b", number, weight=0.5)
    handed_back = await take(leases)
    assert handed_back.job_id == "a0"
    assert await leases.hand_back(handed_back, lease_s=LEASE_S)
    waiting = [*(f"a{i}" for i in range(6)), *(f"b{i}" for i in range(3))]
    told = {job_id: (await queue.get(job_id)).position for job_id in waiting}
    assert told["a0"] == 0
    order = [(await take_over(leases)).job_id] + [(await take(leases)).job_id for _ in range(8)]
    assert told == {job_id: place for place, job_id in enumerate(order)}
    assert await positions(queue, *waiting) == [None] * 9


# --- priorities ---


async def test_higher_priorities_go_first_and_low_ones_do_not_starve(
    queue: JobQueue, leases: JobLeases
) -> None:
    low = [await ask(queue, "a", n, priority="low") for n in range(10, 13)]
    normal = [await ask(queue, "a", n) for n in range(20, 24)]
    high = [await ask(queue, "a", n, priority="high") for n in range(30, 38)]
    told = await positions(queue, *low, *normal, *high)
    order = [await serve(leases) for _ in range(15)]
    classes = "".join({"1": "l", "2": "n", "3": "h"}[job_id[1]] for job_id in order)
    assert classes == "hhhhlhhhhlnnnnl"
    assert told == [order.index(job_id) for job_id in (*low, *normal, *high)]
    for jobs in (low, normal, high):
        assert [job_id for job_id in order if job_id in jobs] == jobs


async def test_a_lower_priority_never_brings_a_job_forward(
    queue: JobQueue, leases: JobLeases
) -> None:
    """Not even where few others have it."""
    for number, priority in enumerate(("normal",) * 6 + ("high", "low", "high", "normal")):
        await ask(queue, "a", number, priority=priority)
        if number == 7:
            await serve(leases)
        places = []
        for asked in PRIORITIES:
            job_id = await ask(queue, "a", 100 + 10 * number + len(places), priority=asked)
            places += await positions(queue, job_id)
            await end(queue, job_id)
        assert places == sorted(places, key=lambda place: place or 0), places


async def test_position_rises_when_a_job_of_higher_priority_overtakes(
    queue: JobQueue, leases: JobLeases
) -> None:
    jobs = [await ask(queue, "a", n, priority="low") for n in range(3)]
    assert await positions(queue, *jobs) == [0, 1, 2]
    await ask(queue, "a", 10, priority="high")
    assert await positions(queue, "a10", *jobs) == [0, 1, 2, 3]
    await end(queue, "a10")
    assert await positions(queue, *jobs) == [0, 1, 2]


async def test_a_low_job_waits_for_four_high_ones_whenever_they_come(
    queue: JobQueue, leases: JobLeases
) -> None:
    await ask(queue, "a", 0, priority="low")
    for number in range(1, 5):
        await ask(queue, "a", number, priority="high")
        assert await serve(leases) == f"a{number}"
    await ask(queue, "a", 5, priority="high")
    assert [await serve(leases), await serve(leases)] == ["a0", "a5"]


@pytest.mark.parametrize("others", ["normal", "low"])
async def test_a_key_that_asks_only_high_gets_no_larger_share(
    queue: JobQueue, leases: JobLeases, others: Priority
) -> None:
    for number in range(20):
        await ask(queue, "a", number, priority="high")
        await ask(queue, "b", number, priority=others)
    assert await served(leases, 10) == {"a": 5, "b": 5}
    for number in range(20, 30):
        await ask(queue, "a", number, priority="high")
    assert await served(leases, 20) == {"a": 10, "b": 10}


async def test_a_key_gains_nothing_by_overtaking_its_own_dear_jobs(
    queue: JobQueue, leases: JobLeases
) -> None:
    """Costs are shared as before, in whatever order a key spends its share."""
    for number in range(12):
        await ask(queue, "b", number)
    for number in range(3):
        await ask(queue, "a", number, max_tokens=29, priority="low")  # as much as three of b's
    for number in range(3, 6):
        await ask(queue, "a", number, priority="high")
    order = [await serve(leases) for _ in range(15)]
    spent = [(30 if job_id in ("a0", "a1", "a2") else 10, job_id[0]) for job_id in order]
    for taken in range(1, len(spent) + 1):
        cost = {owner: sum(c for c, o in spent[:taken] if o == owner) for owner in "ab"}
        assert abs(cost["a"] - cost["b"]) <= 40, order
    assert order.index("a5") < order.index("a0"), "and what was overtaken comes after"


async def test_what_was_cancelled_delays_nothing_of_its_priority(
    queue: JobQueue, leases: JobLeases
) -> None:
    for number in range(10):
        await ask(queue, "a", number, priority="low")
    for number in range(10, 30):
        await ask(queue, "a", number, priority="high")
    for number in range(10, 29):
        await end(queue, f"a{number}")
    assert await positions(queue, "a29", "a0", "a9") == [0, 1, 10]
    assert await serve(leases) == "a29"


async def test_jobs_that_the_previous_release_has_put_in_line_are_normal(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    for number in range(2):
        await ask(queue, "a", number)
        await redis.hdel(keys.job(f"a{number}"), "priority")
    await ask(queue, "a", 2, priority="low")
    await ask(queue, "a", 3, priority="high")
    assert await positions(queue, "a3", "a0", "a1", "a2") == [0, 1, 2, 3]
    assert [await serve(leases) for _ in range(4)] == ["a3", "a0", "a1", "a2"]
    await assert_empty(redis, keys, leases)


# --- tickets ---


async def entries(redis: Redis, keys: RedisKeys) -> tuple[int, int]:
    stream = keys.jobs(MODEL)
    return await redis.xlen(stream), (await redis.xpending(stream, GROUP))["pending"]


async def test_stream_is_as_long_as_what_waits_and_what_runs_whoever_is_next(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    """What autoscalers read."""
    await ask_all(queue, b=4, a=2)
    running = [await take(leases) for _ in range(3)]
    assert sorted(d.job_id for d in running) == ["a0", "a1", "b0"]
    assert await entries(redis, keys) == (6, 3)
    await finish(leases, running[0])
    assert await entries(redis, keys) == (5, 2)
    assert (await queue.depth(MODEL)).queued == 3


async def test_job_that_was_given_anothers_entry_keeps_its_lease(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    await ask_all(queue, b=1, a=1)
    first = await take(leases)
    assert first.job_id == "a0", "with the entry of b0"
    assert await redis.hgetall(keys.given(MODEL)) == {first.entry_id.encode(): b"a0"}
    await end(queue, "b0")
    assert await leases.renew([first]) == [True], "b0 has taken nothing along"
    other = leases_of(redis, keys, "worker-b")
    assert await leases.enter(first)
    second = await take_over(other)
    assert (second.job_id, second.attempt, second.entry_id) == ("a0", 2, first.entry_id)
    assert second.is_suspect
    await finish(other, second)
    await assert_empty(redis, keys, leases)


async def test_repeated_take_gives_the_same_job(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    """As when the connection is lost before the reply, and the client sends the script again."""
    await ask_all(queue, b=1, a=1)
    entry_id = await leases.read_entry(1.0)
    assert entry_id is not None
    args = (MODEL, entry_id, "worker-a", "take", "{}", 60_000)
    scripts = Scripts(redis, keys.prefix)
    first = await scripts.run("start", *args)
    again = await scripts.run("start", *args)
    assert first[0] == b"a0" and again[:12] == first[:12], "all but the state of the queue"
    assert await redis.hget(keys.job("a0"), "attempt") == b"1"
    assert (await take(leases)).job_id == "b0"
    await end(queue, "a0")
    assert await scripts.run("start", *args) == [], "that entry is gone"


async def test_ticket_whose_reader_died_is_good_for_the_next_job(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    await ask(queue, "b", 0)
    assert await leases.read_entry(1.0) is not None  # and dies before it has the job
    other = leases_of(redis, keys, "worker-b")
    assert await other.take(block_s=0.01) is None
    await ask(queue, "a", 0)
    assert (await positions(queue, "b0", "a0")) in ([0, 1], [1, 0])
    taken = {(await take_over(other)).job_id, (await take(other)).job_id}
    assert taken == {"a0", "b0"}
    assert await entries(redis, keys) == (2, 2)


async def test_ticket_of_a_reported_worker_is_free_at_once(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    await ask(queue, "b", 0)
    assert await leases.read_entry(1.0) is not None
    assert await Scripts(redis, keys.prefix).run("report_end", "worker-a", "own", 600_000) == 1
    other = leases_of(redis, keys, "worker-b")
    delivery = await other.take_over(lease_s=600, may_be_suspect=False)
    assert delivery is not None and delivery.job_id == "b0"


async def test_lost_tickets_are_replaced(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    await ask_all(queue, a=3)
    await redis.delete(keys.jobs(MODEL))
    for _ in range(3):
        await queue.sweep()
    assert await redis.xlen(keys.jobs(MODEL)) == 3, "and no more tickets than jobs"
    await leases.ensure_group()
    assert [await serve(leases) for _ in range(3)] == ["a0", "a1", "a2"]
    await queue.sweep()
    await assert_empty(redis, keys, leases)


async def test_jobs_in_the_hands_of_workers_need_no_tickets(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    await ask_all(queue, a=4)
    await take(leases)
    assert await leases.hand_back(await take(leases), lease_s=LEASE_S)
    await queue.sweep()
    assert await entries(redis, keys) == (4, 2)


# --- the previous release ---


async def queue_in_the_old_form(
    redis: Redis, keys: RedisKeys, queue: JobQueue, job_id: str
) -> None:
    """As a release without an order does: an entry for the job, and a place by time."""
    await queue.reserve(MODEL, job_id, max_jobs=1000, lease_s=30)
    await queue.create(make_request(job_id).model_copy(update={"owner": "old"}))
    await redis.hdel(keys.job(job_id), "length")
    request = with_frames(make_request(job_id)).model_dump_json()
    entry_id = await redis.xadd(keys.jobs(MODEL), {"job_id": job_id})
    seconds, microseconds = await redis.time()
    now_ms = int(seconds) * 1000 + int(microseconds) // 1000
    fields = {"state": "queued", "request": request, "entry_id": entry_id, "queued_at": now_ms}
    await redis.hset(keys.job(job_id), mapping=fields)
    await redis.zrem(keys.places(MODEL), job_id)
    await redis.zadd(keys.queued(MODEL), {job_id: now_ms})


async def take_in_the_old_form(redis: Redis, keys: RedisKeys, worker_id: str) -> str | None:
    """As a worker of that release does: an entry belongs to its job, or to none."""
    stream = keys.jobs(MODEL)
    reply = await redis.xreadgroup(GROUP, worker_id, {stream: ">"}, count=1)
    if not reply:
        return None
    entry_id, fields = reply[0][1][0]
    job_id: str = fields[b"job_id"].decode()
    state, own_entry = await redis.hmget(keys.job(job_id), "state", "entry_id")
    if state in (None, b"done", b"error", b"cancelled") or own_entry != entry_id:
        await redis.xack(stream, GROUP, entry_id)
        await redis.xdel(stream, entry_id)
        return None
    await redis.hincrby(keys.job(job_id), "attempt", 1)
    await redis.hset(keys.job(job_id), mapping={"state": "running", "worker": worker_id})
    await redis.zrem(keys.queued(MODEL), job_id)
    return job_id


async def test_jobs_of_the_previous_release_finish(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    await queue_in_the_old_form(redis, keys, queue, "o0")
    await ask(queue, "a", 0)
    await queue_in_the_old_form(redis, keys, queue, "o1")
    await ask(queue, "a", 1)
    assert (await positions(queue, "o0"))[0] == 0
    await queue.sweep()
    assert (await entries(redis, keys))[0] == 4
    first = await take(leases)
    assert first.job_id == "o0" and await leases.hand_back(first, lease_s=LEASE_S)
    again = await take_over(leases)
    assert (again.job_id, again.attempt) == ("o0", 2)
    await finish(leases, again)
    assert sorted([await serve(leases) for _ in range(3)]) == ["a0", "a1", "o1"]
    await assert_empty(redis, keys, leases)


async def test_running_job_of_the_previous_release_is_taken_over(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    await queue_in_the_old_form(redis, keys, queue, "o0")
    assert await take_in_the_old_form(redis, keys, "old-worker") == "o0"
    taken = await take_over(leases)
    assert (taken.job_id, taken.attempt) == ("o0", 2)
    await finish(leases, taken)
    await assert_empty(redis, keys, leases)


async def test_no_job_is_lost_between_workers_of_both_releases(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    """Old workers drop the entry of a job that holds another job's entry by now."""
    expected = {await ask(queue, "b", number) for number in range(6)}
    expected |= {await ask(queue, "a", number) for number in range(6)}
    taken: list[str] = []
    async with asyncio.timeout(30):
        while len(taken) < 12:
            await queue.sweep()
            if (old := await take_in_the_old_form(redis, keys, "old-worker")) is not None:
                taken.append(old)
                await end(queue, old)
            await queue.sweep()
            if (delivery := await leases.take(block_s=0.01)) is not None:
                taken.append(delivery.job_id)
                await finish(leases, delivery)
    assert sorted(taken) == sorted(expected)
    await assert_empty(redis, keys, leases)
