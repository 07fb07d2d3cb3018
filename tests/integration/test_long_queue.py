"""Many waiting jobs of one owner: whose turn it is, the places that clients see, and the cost.

Only an owner's first jobs have their turns in the line (`lua/order.lua`): most of the jobs here
wait after them.
"""

import random
from dataclasses import dataclass, field

import pytest
from redis.asyncio import Redis

from app.store.job_leases import JobLeases
from app.store.job_queue import JobQueue
from app.store.keys import RedisKeys
from dycoke_core.config import PRIORITIES, Priority
from dycoke_core.precedence import Precedence
from tests.integration.jobs import MODEL
from tests.integration.test_fair_queue import (
    ask,
    ask_all,
    assert_empty,
    end,
    positions,
    serve,
    served,
)

MAX_AHEAD = 64  # as in `order.lua`
BEHIND = 2**46


@dataclass
class Share:
    """One owner's waiting jobs by the rule, however it is carried out."""

    waiting: list[tuple[str, Priority]] = field(default_factory=list)  # oldest first
    _precedence: Precedence = field(default_factory=Precedence)

    def serve(self) -> str:
        job = self._precedence.ordered(self.waiting, lambda job: job[1])[0]
        self._precedence.note(is_oldest_served=job is self.waiting[0])
        self.waiting.remove(job)
        return job[0]

    def cancel(self, place: int) -> str:
        return self.waiting.pop(place)[0]


async def test_who_is_served_goes_by_the_rule_however_many_wait(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    rng, share, number = random.Random(3), Share(), 0

    async def join(priority: Priority) -> None:
        nonlocal number
        cost = rng.choice((1, 9, 40))
        job_id = await ask(queue, "a", number, priority=priority, max_tokens=cost)
        share.waiting.append((job_id, priority))
        number += 1

    for _ in range(2 * MAX_AHEAD):
        await join("low")
    for _ in range(200):
        await assert_turns(redis, keys, "a")
        action = rng.random()
        if action < 0.5:
            await join(rng.choice(PRIORITIES))
        elif action < 0.65 and share.waiting:
            await end(queue, share.cancel(rng.randrange(len(share.waiting))))
        elif share.waiting:
            assert await serve(leases) == share.serve()
    assert len(share.waiting) > MAX_AHEAD
    while share.waiting:
        assert await serve(leases) == share.serve()
    await assert_empty(redis, keys, leases)


async def test_places_of_those_far_behind_are_told(queue: JobQueue, leases: JobLeases) -> None:
    number = 2 * MAX_AHEAD
    for index in range(number):
        await ask(queue, "a", index)
        await ask(queue, "b", index)
    jobs = [f"{owner}{index}" for index in range(number) for owner in "ab"]
    told = await positions(queue, *jobs)
    assert all(abs((place or 0) - true) <= 1 for true, place in enumerate(told)), told
    assert told[:MAX_AHEAD] == list(range(MAX_AHEAD))
    assert (await positions(queue, await ask(queue, "c", 0))) == [2], "a new owner is not behind"
    await ask(queue, "a", 1000, priority="high")
    assert (await positions(queue, "a1000"))[0] in (0, 1)
    last = f"a{number - 1}"
    before = (await positions(queue, last))[0] or 0
    shares = await served(leases, 20)
    assert abs(shares["a"] - shares["b"]) <= 1
    assert abs(((await positions(queue, last))[0] or 0) - (before - 20)) <= 3


async def test_owners_share_by_cost_however_many_of_theirs_wait(
    queue: JobQueue, leases: JobLeases
) -> None:
    await ask_all(queue, a=2 * MAX_AHEAD)
    for number in range(MAX_AHEAD, 2 * MAX_AHEAD):
        await ask(queue, "a", 1000 + number, priority="high")
    await ask_all(queue, b=2 * MAX_AHEAD)
    shares = await served(leases, 3 * MAX_AHEAD)
    assert abs(shares["a"] - shares["b"]) <= 1


async def assert_turns(redis: Redis, keys: RedisKeys, owner: str) -> None:
    """As many of its jobs have turns as are counted, and at least half of the most that may."""
    found = await redis.zrange(keys.order(MODEL), 0, "+inf", byscore=True, withscores=True)
    turns = [turn for member, turn in found if member.startswith(f"{owner} ".encode())]
    ahead = await redis.hget(keys.tags(MODEL), f"ahead:{owner}")
    number = len(turns) if ahead is None else int(ahead)
    assert sum(turn < BEHIND for turn in turns) == number
    assert min(len(turns), MAX_AHEAD // 2) <= number <= MAX_AHEAD


async def test_overtaking_gives_no_job_the_turn_of_another(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    share, number = Share(), 0

    async def join(priority: Priority, num_jobs: int = 1) -> None:
        nonlocal number
        for _ in range(num_jobs):
            job_id = await ask(queue, "a", number, priority=priority)
            share.waiting.append((job_id, priority))
            number += 1
            await assert_turns(redis, keys, "a")

    await join("low", 90)
    await join("normal", 120)
    await join("high", 48)
    await ask_all(queue, b=80)
    shares = {"a": 0, "b": 0}
    for _ in range(140):
        job_id = await serve(leases)
        shares[job_id[0]] += 1
        if job_id[0] == "a":
            assert job_id == share.serve()
            await join("high")
        assert abs(shares["a"] - shares["b"]) <= 1


async def num_commands(redis: Redis) -> int:
    """Commands that the server has run so far, those in scripts included."""
    stats = await redis.info("commandstats")
    return sum(stat["calls"] for name, stat in stats.items() if name != "cmdstat_info")


async def test_what_is_done_to_the_line_costs_the_same_however_many_wait(
    queue: JobQueue, leases: JobLeases, redis: Redis
) -> None:
    number = 0

    async def cost_of_a_round() -> int:
        """Of better and worse ones that join, are served and cancelled."""
        nonlocal number
        before = await num_commands(redis)
        for priority in ("high", "low", "normal", "low"):
            number += 1
            await ask(queue, "a", number, priority=priority)
            await positions(queue, f"a{number}")
        await end(queue, f"a{number}")
        await end(queue, f"a{number - 1}")
        for _ in range(2):
            await serve(leases)
        return await num_commands(redis) - before

    async def most_in_rounds(num_waiting: int) -> int:
        nonlocal number
        for _ in range(num_waiting):
            number += 1
            await ask(queue, "a", number, priority="low")
        return max([await cost_of_a_round() for _ in range(10)])

    few = await most_in_rounds(2 * MAX_AHEAD)
    many = await most_in_rounds(6 * MAX_AHEAD)
    assert many <= 1.1 * few


# --- the previous release ---


async def as_previous_release(redis: Redis, keys: RedisKeys, owner: str) -> None:
    """Lays an owner's jobs out as it does: each has its turn, and there is no share."""
    found = await redis.zrange(keys.order(MODEL), 0, -1)
    jobs = sorted(found, key=lambda member: int(member.split()[1][1:]))
    await redis.zadd(keys.order(MODEL), {job: 10.0 * place for place, job in enumerate(jobs)})
    await redis.delete(keys.share(f"{MODEL}:{owner}"))
    await redis.hdel(keys.tags(MODEL), f"has_share:{owner}", f"ahead:{owner}")


async def test_a_line_of_the_previous_release_is_taken_over(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    number = 2 * MAX_AHEAD
    await ask_all(queue, a=number)
    await as_previous_release(redis, keys, "a")
    assert await positions(queue, "a0", f"a{number - 1}") == [0, number - 1]
    assert await serve(leases) == "a0", "no job has joined yet"
    share = Share([(f"a{place}", "normal") for place in range(1, number)])
    for _ in range(3):
        for priority in PRIORITIES:
            number += 1
            share.waiting.append((await ask(queue, "a", number, priority=priority), priority))
    assert await positions(queue, "a1", share.waiting[-9][0]) == [3, 0]
    while share.waiting:
        assert await serve(leases) == share.serve()
    await assert_empty(redis, keys, leases)


async def serve_as_previous_release(redis: Redis, keys: RedisKeys) -> str:
    """Takes the job whose turn comes first and ends it; returns its id. There is no BEHIND."""
    order = keys.order(MODEL)
    ((member, turn),) = await redis.zrange(
        order, 0, "+inf", byscore=True, offset=0, num=1, withscores=True
    )
    assert await redis.zrem(order, member) == 1
    await redis.hset(keys.tags(MODEL), "now", turn)
    job_id = str(member.split()[1].decode())
    await redis.hset(keys.job(job_id), "state", "cancelled")
    await redis.zrem(keys.queued(MODEL), job_id)
    return job_id


async def test_jobs_behind_have_their_turn_when_the_previous_release_has_served_all_others(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    number = 2 * MAX_AHEAD
    await ask_all(queue, a=number)
    for place in range(MAX_AHEAD + 9):
        assert await serve_as_previous_release(redis, keys) == f"a{place}"
    expected = [f"a{place}" for place in range(MAX_AHEAD + 9, number)]
    assert [await serve(leases) for _ in expected] == expected
    assert await redis.exists(keys.order(MODEL), keys.share(f"{MODEL}:a")) == 0


@pytest.mark.parametrize("num_served", [MAX_AHEAD, MAX_AHEAD + 40], ids=["ahead", "all"])
@pytest.mark.parametrize("then", ["join", "sweep"])
async def test_jobs_behind_have_their_turn_although_others_wait(
    queue: JobQueue,
    leases: JobLeases,
    redis: Redis,
    keys: RedisKeys,
    then: str,
    num_served: int,
) -> None:
    """When the previous release has served all others of their owner, or all there were."""
    number = MAX_AHEAD + 40
    await ask_all(queue, a=number)
    for _ in range(num_served):
        await serve_as_previous_release(redis, keys)
    await ask_all(queue, b=60)
    if then == "sweep":
        await queue.sweep()
    for place in range(number, num_served + 40):
        await ask(queue, "a", place)
    if then == "join":
        await ask(queue, "a", num_served + 40)
    assert await served(leases, 40) == {"a": 20, "b": 20}
    await assert_turns(redis, keys, "a")


@pytest.mark.parametrize("share_end", [10, -90], ids=["joined", "ended"])
async def test_virtual_time_in_which_the_previous_release_counts_behind_harms_no_key(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys, share_end: int
) -> None:
    """Who joined then has turns like others who come later."""
    await ask_all(queue, a=MAX_AHEAD + 9)
    for _ in range(MAX_AHEAD + 5):
        await serve_as_previous_release(redis, keys)
    now = float(await redis.hget(keys.tags(MODEL), "now") or 0)
    assert now > BEHIND
    # A job of b has joined then and ended; or ten others of b too, that had come before
    await redis.hset(keys.tags(MODEL), "owner:b", BEHIND + share_end)
    await ask(queue, "b", 0)
    await serve(leases)
    await ask_all(queue, c=40)
    for number in range(1, 41):
        await ask(queue, "b", number)
    shares = await served(leases, 40)
    assert abs(shares["b"] - shares["c"]) <= 2, shares
    assert float(await redis.hget(keys.tags(MODEL), "now") or 0) < BEHIND / 2


async def test_a_line_that_the_previous_release_has_laid_out_is_served_in_order(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    """It gives each job a turn: however costly those that join later, none overtakes unduly."""
    number = 3 * MAX_AHEAD
    await ask_all(queue, a=number)
    jobs = [f"a{place}" for place in range(number)]
    turns = {f"a {job_id}": 10.0 * place for place, job_id in enumerate(jobs)}
    await redis.zadd(keys.order(MODEL), turns)
    dear = await ask(queue, "a", number, priority="high", max_tokens=10 * number)
    await assert_turns(redis, keys, "a")
    assert [await serve(leases) for _ in range(number + 1)] == [dear, *jobs]
