"""What one key may take, on a real Redis: refusals, honest waits, and what each end gives back."""

import asyncio

import pytest
from redis.asyncio import Redis

from app.errors import KeyLimitError
from app.keys.limits import KeyLimits, LimitState
from app.messages import ErrorEvent, JobState
from app.store.job_leases import Append, JobLeases
from app.store.job_queue import Idempotency, JobQueue, Orphan
from app.store.keys import RedisKeys
from app.store.owner_limits import Allowance
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
from tests.integration.lua_clock import LuaClock

OWNER = "key_a"
RECEIPT_TOKENS = 20 + 3  # of the prompt, and of three tokens of an answer


def allowance(
    owner: str = OWNER, *, prompt: int = 0, answer: int = 0, frames: int = 0, **limits: int
) -> Allowance:
    return Allowance(owner, KeyLimits(**limits), prompt, answer, frames)


async def post(
    queue: JobQueue, job_id: str, allowance: Allowance, *, is_read: bool = True
) -> tuple[LimitState, ...]:
    """Makes a job; returns what its owner has left of its limits then."""
    request = make_request(job_id).model_copy(update={"owner": allowance.owner})
    await queue.reserve(MODEL, job_id, max_jobs=100, lease_s=30, owner=allowance.owner)
    try:
        created = await queue.create(request, allowance=allowance)
    except KeyLimitError:
        await queue.release(MODEL, job_id)
        raise
    if is_read:
        assert await queue.enqueue(with_frames(request))
    return created.limit_states


async def refusal(queue: JobQueue, allowance: Allowance) -> KeyLimitError:
    with pytest.raises(KeyLimitError) as refused:
        await post(queue, "refused", allowance)
    return refused.value


async def level(redis: Redis, keys: RedisKeys, kind: str = "tokens") -> float | None:
    """What is in a bucket; None: it is full."""
    saved = await redis.hget(keys.bucket(f"{OWNER}:{kind}"), "level")
    return None if saved is None else float(saved)


# --- jobs ---


async def test_a_key_has_so_many_jobs_at_a_time(queue: JobQueue, leases: JobLeases) -> None:
    two = allowance(max_jobs=2)
    assert [q.left for q in await post(queue, "a", two)] == [1]
    assert [q.left for q in await post(queue, "b", two, is_read=False)] == [0]
    error = await refusal(queue, two)
    assert error.retry_after_s >= 1 and error.retryable
    (state,) = error.limit_states
    assert (state.name, state.limit, state.left, state.window_s) == ("jobs", 2, 0, None)
    await take(leases)
    await refusal(queue, two)
    await post(queue, "other", allowance("key_b", max_jobs=2))
    assert (await queue.depth(MODEL)).waiting == 2, "what was refused holds no place"


async def test_a_key_has_so_many_waiting_jobs(queue: JobQueue, leases: JobLeases) -> None:
    one = allowance(max_queued_jobs=1)
    await post(queue, "a", one, is_read=False)
    assert [state.name for state in (await refusal(queue, one)).limit_states] == ["queued-jobs"]
    await queue.enqueue(with_frames(make_request("a")))
    await refusal(queue, one)
    delivery = await take(leases)
    await post(queue, "b", one)
    await refusal(queue, one)
    await queue.end("b", JobState.CANCELLED, cancelled("b"))
    assert await leases.hand_back(delivery, lease_s=LEASE_S), "which waits again"
    await refusal(queue, one)


async def done(queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys) -> None:
    delivery = await take(leases)
    await leases.append([Append(delivery, [token(0)], receipt(delivery, 1))])


async def failed(queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys) -> None:
    delivery = await take(leases)
    error = ErrorEvent(code="x", message="x", retryable=False, job_id="a")
    await leases.append([Append(delivery, [], error)])


async def cancelled_while_it_waits(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    await queue.end("a", JobState.CANCELLED, cancelled("a"))


async def cancelled_while_it_runs(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    await take(leases)
    await queue.end("a", JobState.CANCELLED, cancelled("a"))


async def expired(queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys) -> None:
    await redis.zadd(keys.live, {"a": 1})
    assert (await queue.sweep()).overdue == ("a",)


async def lost_with_its_workers(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    other = leases_of(redis, keys, "worker-b")
    assert await leases.enter(await take(leases))
    assert await other.enter(await take_over(other))
    async with asyncio.timeout(20):
        while (await queue.get("a")).state is not JobState.ERROR:
            await leases.take_over(lease_s=0.1, may_be_suspect=True)
            await asyncio.sleep(0.02)


ENDS = (
    done,
    failed,
    cancelled_while_it_waits,
    cancelled_while_it_runs,
    expired,
    lost_with_its_workers,
)


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
async def test_every_end_lets_the_next_job_in(
    end: object, queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys
) -> None:
    one = allowance(max_jobs=1, max_queued_jobs=1)
    await post(queue, "a", one)
    await refusal(queue, one)
    await end(queue, leases, redis, keys)  # type: ignore[operator]
    await post(queue, "b", one)
    await queue.end("b", JobState.CANCELLED, cancelled("b"))
    assert not await redis.exists(keys.owner_jobs(OWNER))


async def test_job_whose_readers_are_lost_lets_the_next_one_in(queue: JobQueue) -> None:
    one = allowance(max_jobs=1, frames_per_minute=60, frames=30)
    await post(queue, "a", one, is_read=False)
    orphan = Orphan(MODEL, "a")
    async with asyncio.timeout(20):
        while (await queue.get("a")).state is JobState.READING:
            await queue.renew_place(MODEL, "a", lease_s=0)
            await queue.adopt(orphan, lease_s=30)
    limit_states = await post(queue, "b", one, is_read=False)
    assert {state.name: state.left for state in limit_states} == {"jobs": 0, "frames": 30}, (
        "none was read"
    )


async def test_job_that_ended_unnoticed_is_not_counted(
    queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    """As under a release that does not keep count."""
    one = allowance(max_jobs=1)
    await post(queue, "a", one)
    await redis.zrem(keys.live, "a")
    await post(queue, "b", one)


# --- buckets ---


@pytest.mark.parametrize("kind", ["tokens", "frames"])
async def test_after_retry_after_a_request_is_let_in_and_no_sooner(
    kind: str, queue: JobQueue, redis: Redis, keys: RedisKeys, clock: LuaClock
) -> None:
    half = allowance(prompt=100, answer=200, frames=300, **{f"{kind}_per_minute": 600})
    limit_states = [await post(queue, job_id, half) for job_id in "ab"]
    assert [state.left for (state,) in limit_states] == [300, 0]
    error = await refusal(queue, half)
    assert error.retry_after_s == 30, "half a bucket fills in half a minute"
    (state,) = error.limit_states
    assert state == LimitState(kind, kind, 600, 0, 60, 30, 30)  # type: ignore[arg-type]
    assert 0 < await redis.pttl(keys.bucket(f"{OWNER}:{kind}")) <= 60_001
    await clock.advance(29)
    assert (await refusal(queue, half)).retry_after_s == 1
    await clock.advance(1)
    await post(queue, "c", half)


async def test_request_larger_than_the_bucket_waits_until_it_is_full(
    queue: JobQueue, clock: LuaClock
) -> None:
    large = allowance(prompt=500, answer=200, tokens_per_minute=600)
    await post(queue, "a", large)
    error = await refusal(queue, large)
    assert error.retry_after_s == 70, "the debt, and then the whole bucket"
    await clock.advance(70)
    await post(queue, "b", large)
    assert (await refusal(queue, allowance(answer=1, tokens_per_minute=600))).retry_after_s == 11


async def test_at_the_headers_a_key_without_tokens_is_refused(
    queue: JobQueue, clock: LuaClock
) -> None:
    limits = KeyLimits(tokens_per_minute=600, frames_per_minute=10)
    await queue.admit(max_jobs=10, owner=OWNER, limits=limits)
    await post(queue, "a", Allowance(OWNER, limits, 0, 300, 10))
    await queue.admit(max_jobs=10, owner=OWNER, limits=limits)  # it may be about no frames
    await post(queue, "b", Allowance(OWNER, limits, 0, 300, 0))
    with pytest.raises(KeyLimitError) as refused:
        await queue.admit(max_jobs=10, owner=OWNER, limits=limits)
    assert refused.value.retry_after_s == 30, "one like the last one has to fit"
    await clock.advance(30)
    await queue.admit(max_jobs=10, owner=OWNER, limits=limits)
    await post(queue, "c", Allowance(OWNER, limits, 0, 300, 0))


@pytest.mark.parametrize(
    ("end", "used"),
    [
        (cancelled_while_it_waits, 0),
        (expired, 0),
        (failed, 100),
        (cancelled_while_it_runs, 100),
        (lost_with_its_workers, 100),
        (done, 20 + 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_what_was_really_used_is_what_counts(
    end: object,
    used: int,
    queue: JobQueue,
    leases: JobLeases,
    redis: Redis,
    keys: RedisKeys,
    clock: LuaClock,
) -> None:
    await post(queue, "a", allowance(prompt=100, answer=5000, tokens_per_minute=6000))
    assert await level(redis, keys) == 900
    await end(queue, leases, redis, keys)  # type: ignore[operator]
    async with asyncio.timeout(20):
        while used == 0 and await level(redis, keys) is not None:
            await asyncio.sleep(0.01)  # a full bucket is no key
    assert (await level(redis, keys) or 6000) == 6000 - used


async def test_answer_that_took_more_than_predicted_is_a_debt(
    queue: JobQueue, leases: JobLeases, clock: LuaClock
) -> None:
    limits = {"tokens_per_minute": 10}
    await post(queue, "a", allowance(prompt=1, answer=1, **limits))
    delivery = await take(leases)
    events = [token(0), token(1), token(2)]
    await leases.append([Append(delivery, events, receipt(delivery, 3))])
    error = await refusal(queue, allowance(answer=1, **limits))
    assert error.retry_after_s == (RECEIPT_TOKENS - 10 + 1) * 6
    await clock.advance(error.retry_after_s)
    await post(queue, "b", allowance(answer=1, **limits))


@pytest.mark.parametrize(
    ("before", "after", "left"),
    [
        (600, 6000, 6000 - 300 + 200),  # taken by the second one, given back by the first one
        (6000, 600, 600 - 300 + 200),
        (6000, 0, 6000 - 300),  # as it was: it counts no longer
        (0, 600, 600 - 300),  # the first one has taken nothing
    ],
)
async def test_job_gives_back_to_the_bucket_as_it_is_by_then(
    before: int,
    after: int,
    left: int,
    queue: JobQueue,
    leases: JobLeases,
    redis: Redis,
    keys: RedisKeys,
    clock: LuaClock,
) -> None:
    """The key's limit is changed between its two jobs; the first one ends after that."""
    first = allowance(prompt=100, answer=200, tokens_per_minute=before, max_jobs=9)
    await post(queue, "a", first)
    await clock.advance(60)
    await post(queue, "b", allowance(answer=300, tokens_per_minute=after, max_jobs=9))
    assert (await take(leases)).job_id == "a"
    await queue.end("a", JobState.CANCELLED, cancelled("a"))
    assert await level(redis, keys) == left


async def test_lowered_limit_is_what_fills_the_bucket_from_the_next_request_on(
    queue: JobQueue, leases: JobLeases, redis: Redis, keys: RedisKeys, clock: LuaClock
) -> None:
    """That request is refused: no job tells of the limit."""
    await post(queue, "a", allowance(prompt=7200, tokens_per_minute=6000))
    assert (await take(leases)).job_id == "a"
    limits = KeyLimits(tokens_per_minute=60)
    with pytest.raises(KeyLimitError):
        await queue.admit(max_jobs=10, owner=OWNER, limits=limits)
    await clock.advance(10)
    await queue.end("a", JobState.CANCELLED, cancelled("a"))
    assert await level(redis, keys) == 6000 - 7200 + 10
    assert await redis.get(keys.owner_limits(OWNER)) == b"0 0 60 0"


async def test_when_a_job_may_end_is_told_by_those_that_run(
    queue: JobQueue, leases: JobLeases, clock: LuaClock
) -> None:
    two = allowance(max_jobs=2)
    for job_id in "ab":
        await post(queue, job_id, two)
        await take(leases)
        await clock.advance(10)
    assert (await refusal(queue, two)).retry_after_s == 10
    await clock.advance(1000)
    assert (await refusal(queue, two)).retry_after_s == 60


async def test_repeated_request_and_repeated_script_take_nothing(
    queue: JobQueue, redis: Redis, keys: RedisKeys, clock: LuaClock
) -> None:
    half = Allowance(OWNER, KeyLimits(max_jobs=1, tokens_per_minute=600), 0, 300)
    once = Idempotency("key", "body", ttl_s=60)
    request = make_request("a").model_copy(update={"owner": OWNER})
    await queue.reserve(MODEL, "a", max_jobs=9, lease_s=30)
    for _ in range(2):
        created = await queue.create(request, idempotency=once, allowance=half)
        assert created.job_id == "a"
    await queue.reserve(MODEL, "b", max_jobs=9, lease_s=30)
    again = make_request("b").model_copy(update={"owner": OWNER})
    assert (await queue.create(again, idempotency=once, allowance=half)).job_id == "a"
    assert await redis.zcard(keys.owner_jobs(OWNER)) == 1
    assert await level(redis, keys) == 300


async def test_concurrent_posts_never_exceed_the_limit(queue: JobQueue) -> None:
    results = await asyncio.gather(
        *(post(queue, f"j{i}", allowance(max_jobs=3)) for i in range(12)), return_exceptions=True
    )
    assert sum(isinstance(result, KeyLimitError) for result in results) == 9
    assert sum(isinstance(result, tuple) for result in results) == 3


def test_limits_of_a_key_stand_before_the_settings() -> None:
    defaults = KeyLimits(max_jobs=5, tokens_per_minute=100)
    mine = KeyLimits(max_jobs=0, frames_per_minute=7).or_else(defaults)
    assert (mine.max_jobs, mine.tokens_per_minute, mine.frames_per_minute) == (0, 100, 7)
    assert Allowance(OWNER, mine).limit_words == "0 0 100 7"
    assert Allowance(OWNER, KeyLimits(max_jobs=0)).limit_words == ""
    assert KeyLimits.model_validate({"max_running_jobs": 2}).max_jobs == 2, "as first written"
