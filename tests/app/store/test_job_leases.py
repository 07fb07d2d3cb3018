"""What workers do to jobs, on a real Redis: leases, fencing, failover, one call for many jobs."""

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from app.errors import (
    StoreUnavailableError,
)
from app.messages import ErrorEvent, JobState, StatusEvent, TokenEvent
from app.store import job_leases
from app.store.client import Scripts, connect
from app.store.event_log import EventLog
from app.store.job_leases import Append, JobLeases
from app.store.job_queue import JobQueue
from app.store.keys import GROUP, RedisKeys
from dycoke_core.sequence import SAMPLER_VERSION
from tests.integration.conftest import RedisServer
from tests.integration.jobs import (
    LEASE_S,
    MODEL,
    cancelled,
    entries,
    event_types,
    finish,
    leases_of,
    say,
    start,
    submit,
    take,
    take_over,
    token,
)

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

    _, [*first, _] = await claim("one")  # last is how things look just now
    assert first[:2] == [b"a", b"2"]
    dead, [*again, _] = await claim("one")
    assert (dead, again) == ([], first)
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
