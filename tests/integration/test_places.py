"""Who gets a place in a full queue, on a real Redis: a key that has taken all places keeps no other
key out, and the number of places stays bounded.
"""

from collections import Counter

import pytest
from redis.asyncio import Redis

from app.errors import QueueFullError
from app.keys.entries import ANONYMOUS
from app.messages import JobState
from app.store.job_leases import JobLeases
from app.store.job_queue import JobQueue
from app.store.keys import RedisKeys
from app.store.owner_limits import num_places
from tests.integration.jobs import (
    LEASE_S,
    MODEL,
    cancelled,
    make_request,
    take,
    with_frames,
)

MAX_JOBS = 64


class Askers:
    """Keys that take places, and what each of them has."""

    def __init__(self, queue: JobQueue, max_jobs: int = MAX_JOBS) -> None:
        self._queue = queue
        self._max_jobs = max_jobs
        self._number = 0
        self.held: Counter[str] = Counter()

    async def ask(self, owner: str, *, is_queued: bool = True, num_places: int = 1) -> str | None:
        """A job's id; None: refused."""
        self._number += 1
        job_id = f"{owner}/{self._number}"
        try:
            await self._queue.reserve(
                MODEL,
                job_id,
                max_jobs=self._max_jobs,
                lease_s=30,
                owner=owner,
                num_places=num_places,
            )
        except QueueFullError as error:
            assert error.retry_after_s >= 1
            return None
        self.held[owner] += 1
        if is_queued:
            request = make_request(job_id).model_copy(update={"owner": owner})
            await self._queue.create(request)
            assert await self._queue.enqueue(with_frames(request))
        return job_id

    async def flood(self, owner: str, *, num_places: int = 1) -> int:
        """Asks until it is refused; returns how many jobs it was granted."""
        granted = 0
        while await self.ask(owner, is_queued=False, num_places=num_places):
            granted += 1
        return granted

    async def cancel(self, job_id: str) -> None:
        assert await self._queue.end(job_id, JobState.CANCELLED, cancelled(job_id))
        self.held[job_id.partition("/")[0]] -= 1


@pytest.fixture
def askers(queue: JobQueue) -> Askers:
    return Askers(queue)


async def test_a_key_alone_has_all_places_and_no_more(askers: Askers) -> None:
    assert await askers.flood(ANONYMOUS) == MAX_JOBS
    assert await askers.ask(ANONYMOUS) is None


async def test_key_with_ten_times_the_jobs_keeps_another_out_of_nothing(
    queue: JobQueue, leases: JobLeases, askers: Askers
) -> None:
    """One posts ten times as often as the other, far more than is served: the other always gets
    in."""
    refused = Counter[str]()
    for _ in range(40):
        for owner in ("a",) * 10 + ("b",):
            refused[owner] += await askers.ask(owner) is None
        for _ in range(2):
            delivery = await take(leases)
            askers.held[delivery.request.owner] -= 1
            await queue.end(delivery.job_id, JobState.CANCELLED, cancelled(delivery.job_id))
        assert askers.held.total() <= 2 * MAX_JOBS
    assert refused["b"] == 0 and refused["a"] > 200
    assert (await queue.depth(MODEL)).waiting == askers.held.total()


async def test_sixty_keys_get_in_beside_one_that_has_filled_the_queue(askers: Askers) -> None:
    assert await askers.flood("greedy") == MAX_JOBS
    for number in range(59):
        assert await askers.ask(f"key{number}"), number
    assert await askers.ask("greedy") is None
    assert await askers.ask("key0") is None, "it has its share"


async def test_sixty_floods_leave_room_for_none_but_those_without_a_job(askers: Askers) -> None:
    granted = [await askers.flood(f"key{number}") for number in range(60)]
    assert granted == sorted(granted, reverse=True), "no one gains by coming late"
    assert granted[0] == MAX_JOBS and sum(granted) == 2 * MAX_JOBS
    assert granted[1] == 22, "until 2 x 22 >= 64 - 22"
    assert sum(map(bool, granted)) > 15
    assert await askers.ask("late") is None, "there is an end"
    assert all([await askers.ask(f"key{n}") is None for n in range(60)])


async def test_first_place_that_is_free_again_goes_to_a_key_without_one(askers: Askers) -> None:
    jobs = [await askers.ask("greedy") for _ in range(MAX_JOBS)]
    others = [await askers.flood(f"key{number}") for number in range(60)]
    assert sum(others) == MAX_JOBS
    assert jobs[0] is not None
    await askers.cancel(jobs[0])
    assert await askers.ask("greedy") is None
    assert await askers.ask("key0") is None
    assert await askers.ask("late")


async def test_keys_with_equal_shares_have_no_more_than_all_places(askers: Askers) -> None:
    for _ in range(8):
        for number in range(8):
            assert await askers.ask(f"key{number}")
    assert [await askers.ask(f"key{number}") for number in range(8)] == [None] * 8


async def test_one_place_is_enough_for_two_keys(queue: JobQueue) -> None:
    askers = Askers(queue, max_jobs=1)
    assert [await askers.flood(owner) for owner in ("a", "b", "c")] == [1, 1, 0]


# --- jobs that take several ---


@pytest.mark.parametrize(
    ("frames", "max_tokens", "expected"),
    [(32, 256, 1), (32, 512, 1), (33, 512, 2), (128, 256, 3), (128, 4096, 6), (0, 1, 1)],
)
def test_job_takes_places_by_its_frames_and_tokens(
    frames: int, max_tokens: int, expected: int
) -> None:
    assert num_places(frames=frames, max_tokens=max_tokens) == expected


async def test_large_jobs_fill_the_queue_sooner_and_keep_no_other_key_out(askers: Askers) -> None:
    assert await askers.flood("greedy", num_places=6) == 11, "the last one begins below 64"
    assert await askers.ask("greedy") is None
    for number in range(10):
        assert await askers.ask(f"key{number}", num_places=6), number
    assert await askers.ask("key0") is None, "it has its share"
    assert await askers.ask("late", num_places=6), "as long as a place is left"
    assert await askers.ask("last") is None, "there is an end"


async def test_large_jobs_give_all_their_places_back(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys, askers: Askers
) -> None:
    first = await askers.ask("a", num_places=6)
    second = await askers.ask("b", num_places=3, is_queued=False)
    third = await askers.ask("b", num_places=2)
    assert first and second and third
    assert await counted(redis, keys) == {"a": 6, "b": 5}
    depth = await queue.depth(MODEL)
    assert (depth.waiting, depth.places) == (3, 11)
    await queue.release(MODEL, second)
    delivery = await take(leases)
    assert delivery.job_id == first
    assert await counted(redis, keys) == {"b": 2}
    assert await leases.hand_back(delivery, lease_s=LEASE_S)
    assert await counted(redis, keys) == {"a": 1, "b": 2}
    for job_id in (first, third):
        await askers.cancel(job_id)
    assert await counted(redis, keys) == {}


# --- what is counted ---


async def counted(redis: Redis, keys: RedisKeys) -> dict[str, int]:
    """Places by owner, as noted; both notes must say the same."""
    owners = Counter(
        owner.decode() for owner in (await redis.hgetall(keys.place_owners(MODEL))).values()
    )
    more = await redis.hgetall(keys.more_places(MODEL))
    num_more = int(more.pop(b"", 0))
    for number, owner in (value.decode().split() for value in more.values()):
        owners[owner] += int(number)
        num_more -= int(number)
    assert num_more == 0
    noted = await redis.zrange(keys.owner_places(MODEL), 0, -1, withscores=True)
    assert {owner.decode(): number for owner, number in noted} == owners
    return dict(owners)


async def test_a_place_is_its_owners_until_a_worker_has_the_job_or_it_ends(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys, askers: Askers
) -> None:
    first = await askers.ask("a")
    second = await askers.ask("b", is_queued=False)
    assert first and second
    assert await counted(redis, keys) == {"a": 1, "b": 1}
    await queue.reserve(MODEL, second, max_jobs=MAX_JOBS, lease_s=30, owner="b")
    assert await counted(redis, keys) == {"a": 1, "b": 1}, "it is the same place"
    await queue.release(MODEL, second)
    await queue.release(MODEL, second)
    await queue.release(MODEL, first)  # which has no place any more: it is queued
    assert await counted(redis, keys) == {"a": 1}
    delivery = await take(leases)
    assert await counted(redis, keys) == {}
    assert await leases.hand_back(delivery, lease_s=LEASE_S)
    assert await counted(redis, keys) == {"a": 1}, "it waits again"
    await askers.cancel(first)
    assert await counted(redis, keys) == {}


async def test_place_that_was_never_used_is_nobodys_after_its_lease(
    queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    await queue.reserve(MODEL, "lost", max_jobs=1, lease_s=0, owner="a")
    await queue.reserve(MODEL, "lives", max_jobs=1, lease_s=30, owner="b")
    await queue.sweep()
    assert await counted(redis, keys) == {"b": 1}


async def test_places_and_jobs_that_ended_under_the_previous_release_are_pruned(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys, askers: Askers
) -> None:
    """That release ends jobs without updating these counts."""
    jobs = [await askers.ask("a") for _ in range(3)] + [await askers.ask("b")]
    running = await take(leases)
    assert running.job_id == jobs[0]
    for job_id in jobs[2:]:
        assert job_id
        await redis.zrem(keys.queued(MODEL), job_id)
        await redis.zrem(keys.live, job_id)
    await queue.prune(["a", "b", "c"])
    assert await counted(redis, keys) == {"a": 1}
    assert await queue.num_jobs(["a", "b"]) == [(1, 1), (0, 0)]


async def test_sweep_finds_what_the_previous_release_has_not_given_back(
    queue: JobQueue, redis: Redis, keys: RedisKeys, askers: Askers
) -> None:
    """That release knows of a job's first place alone."""
    waiting = await askers.ask("a", num_places=4)
    taken = await askers.ask("b", num_places=6)
    assert waiting and taken
    await redis.zrem(keys.queued(MODEL), taken)
    await redis.hdel(keys.place_owners(MODEL), taken)
    await redis.zincrby(keys.owner_places(MODEL), -1, "b")
    assert (await queue.depth(MODEL)).places == 4 + 5
    await queue.sweep()
    assert (await queue.depth(MODEL)).places == 4
    assert await counted(redis, keys) == {"a": 4}
