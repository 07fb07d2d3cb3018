"""One reader for all feeds: each gets every event of its job, in order, whatever is lost."""

import asyncio
import gc
import random
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from app.errors import StoreUnavailableError
from app.messages import DoneEvent, ErrorEvent, JobState, StatusEvent, TokenEvent
from app.store.client import connect
from app.store.event_log import FIRST_EVENT, MAX_EVENTS_PER_READ, LoggedEvent
from app.store.event_reader import CONNECTIONS, EventReader, Watch
from app.store.job_leases import Append, Delivery, JobLeases
from app.store.job_queue import JobQueue
from app.store.keys import RedisKeys
from tests.integration.conftest import RedisServer
from tests.integration.jobs import MODEL, cancelled, submit, take, token

PATIENCE_S = 30.0


@asynccontextmanager
async def running_reader(url: str, keys: RedisKeys) -> AsyncIterator[EventReader]:
    redis = connect(url, max_connections=CONNECTIONS)
    reader = EventReader(redis, keys)
    task = asyncio.create_task(reader.run())
    try:
        yield reader
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await redis.aclose()


@pytest.fixture
async def reader(redis_server: RedisServer, keys: RedisKeys) -> AsyncIterator[EventReader]:
    async with running_reader(redis_server.url, keys) as reader:
        yield reader


async def running_job(queue: JobQueue, leases: JobLeases, job_id: str = "j") -> Delivery:
    await submit(queue, job_id)
    return await take(leases)


async def follow(watch: Watch, after: str, num_tokens: int) -> list[TokenEvent]:
    """Reads on until this many tokens have come after `after`."""
    tokens: list[TokenEvent] = []
    async with asyncio.timeout(PATIENCE_S):
        while sum(len(event.token_ids) for event in tokens) < num_tokens:
            try:
                events = await watch.next(after=after, timeout_s=1.0)
            except StoreUnavailableError:
                await asyncio.sleep(0.05)
                continue
            after = events[-1].id if events else after
            tokens += [e for e in map(_event, events) if isinstance(e, TokenEvent)]
    return tokens


def _event(logged: LoggedEvent) -> object:
    return logged.event


async def test_readers_at_different_places_each_get_what_follows_theirs(
    queue: JobQueue, leases: JobLeases, reader: EventReader
) -> None:
    delivery = await running_job(queue, leases)
    await leases.append([Append(delivery, [token(i) for i in range(3)])])
    with reader.watch("j") as first, reader.watch("j") as second, reader.watch("j") as third:
        readers = [
            asyncio.create_task(follow(first, FIRST_EVENT, 6)),
            asyncio.create_task(follow(second, "2-0", 4)),
            asyncio.create_task(follow(third, "3-0", 3)),
        ]
        for i in range(3, 6):
            await leases.append([Append(delivery, [token(i)])])
        for start, tokens in zip((0, 2, 3), await asyncio.gather(*readers), strict=True):
            assert tokens == [token(i) for i in range(start, 6)]


async def test_events_that_nobody_announces_are_found(
    queue: JobQueue, leases: JobLeases, reader: EventReader, redis: Redis, keys: RedisKeys
) -> None:
    """As those of a release that had no channel."""
    await running_job(queue, leases)
    with reader.watch("j") as watch:
        following = asyncio.create_task(follow(watch, "0-1", 2))
        for i in range(2):
            event = token(i).model_dump_json()
            await redis.xadd(keys.events("j"), {"event": event}, id=f"{i + 1}-0")
        assert await following == [token(0), token(1)]


async def test_news_that_does_not_follow_is_not_believed(
    queue: JobQueue, leases: JobLeases, reader: EventReader, redis: Redis, keys: RedisKeys
) -> None:
    """A feed that lacks what precedes an event gets it from the log, or gets nothing."""
    delivery = await running_job(queue, leases)
    with reader.watch("j") as fresh, reader.watch("j") as behind:
        readers = [
            asyncio.create_task(fresh.next(after=FIRST_EVENT, timeout_s=0.5)),
            asyncio.create_task(behind.next(after="0-1", timeout_s=0.5)),
        ]
        await asyncio.sleep(0.05)
        for index in (0, 7):
            news = f"j {index} {index + 1} {token(index + 90).model_dump_json()}"
            await redis.publish(keys.news, news if index else f"other {news}")
        opening, nothing = await asyncio.gather(*readers)
        assert [event.type for event in opening] == ["job"]
        assert nothing == []
        await leases.append([Append(delivery, [token(0)])])
        assert await follow(behind, "0-1", 1) == [token(0)]


async def test_first_event_is_not_skipped_for_an_announced_token(
    queue: JobQueue, leases: JobLeases, reader: EventReader, redis: Redis, keys: RedisKeys
) -> None:
    delivery = await running_job(queue, leases)
    with reader.watch("j") as watch:
        reading = asyncio.create_task(watch.next(after=FIRST_EVENT, timeout_s=5))
        await leases.append([Append(delivery, [token(0)])])
        assert (await reading)[0].type == "job"


async def test_end_comes_from_worker_and_from_others(
    queue: JobQueue, leases: JobLeases, reader: EventReader
) -> None:
    delivery = await running_job(queue, leases, "a")
    await running_job(queue, leases, "b")
    with reader.watch("a") as a, reader.watch("b") as b:
        readers = [
            asyncio.create_task(watch.next(after="0-1", timeout_s=PATIENCE_S)) for watch in (a, b)
        ]
        await leases.append([Append(delivery, [], cancelled("a"))])
        await queue.end("b", JobState.CANCELLED, cancelled("b"))
        for job_id, events in zip("ab", await asyncio.gather(*readers), strict=True):
            assert [event.event for event in events] == [cancelled(job_id)]


async def test_nothing_is_said_before_the_log_was_looked_at(
    queue: JobQueue, leases: JobLeases, reader: EventReader
) -> None:
    """However short the time is: nothing means that there was nothing."""
    delivery = await running_job(queue, leases)
    await leases.append([Append(delivery, [token(0)])])
    with reader.watch("j") as watch:
        assert [event.id for event in await watch.next(after="0-1", timeout_s=0)] == ["1-0"]
        assert await watch.next(after="1-0", timeout_s=0) == []
        assert [event.id for event in await watch.next(after="0-1", timeout_s=0)] == ["1-0"]


async def test_reader_that_was_away_gets_pages_in_order(
    queue: JobQueue, leases: JobLeases, reader: EventReader
) -> None:
    delivery = await running_job(queue, leases)
    with reader.watch("j") as watch:
        num_tokens = MAX_EVENTS_PER_READ + 10
        for i in range(num_tokens):
            await leases.append([Append(delivery, [token(i)])])
        page = await watch.next(after=FIRST_EVENT, timeout_s=5)
        assert len(page) == MAX_EVENTS_PER_READ
        rest = await follow(watch, page[-1].id, num_tokens + 1 - len(page))
        assert rest[-1] == token(num_tokens - 1)
        assert rest[0] == token(len(page) - 1)


async def test_cancelled_wait_loses_nothing(
    queue: JobQueue, leases: JobLeases, reader: EventReader
) -> None:
    delivery = await running_job(queue, leases)
    with reader.watch("j") as watch:
        after = "0-1"
        for i in range(20):
            waiting = asyncio.create_task(watch.next(after=after, timeout_s=5))
            await asyncio.sleep(0)
            await leases.append([Append(delivery, [token(i)])])
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            (event,) = await follow(watch, after, 1)
            assert event == token(i)
            after = f"{i + 1}-0"


async def test_killed_connections_cost_nobody_an_event(
    queue: JobQueue, leases: JobLeases, reader: EventReader, redis: Redis
) -> None:
    delivery = await running_job(queue, leases)
    with reader.watch("j") as watch:
        following = asyncio.create_task(follow(watch, "0-1", 40))
        for i in range(40):
            if i % 10 == 5:
                for kind in ("pubsub", "normal"):
                    await redis.client_kill_filter(_type=kind, skipme=True)
            await leases.append([Append(delivery, [token(i)])])
        assert await following == [token(i) for i in range(40)]


async def test_outage_is_told_to_everybody_and_ends(
    own_redis_server: RedisServer, keys: RedisKeys
) -> None:
    redis = connect(own_redis_server.url)
    queue = JobQueue(redis, keys, result_ttl_s=60)
    leases = JobLeases(redis, keys, model=MODEL, worker_id="w", result_ttl_s=60)
    await leases.ensure_group()
    delivery = await running_job(queue, leases)
    async with running_reader(own_redis_server.url, keys) as reader:
        with reader.watch("j") as one, reader.watch("j") as other:
            await one.next(after=FIRST_EVENT, timeout_s=5)
            own_redis_server.stop()
            for watch in (one, other):
                with pytest.raises(StoreUnavailableError):
                    await watch.next(after="0-1", timeout_s=PATIENCE_S)
            own_redis_server.start()
            readers = [asyncio.create_task(follow(watch, "0-1", 1)) for watch in (one, other)]
            await leases.append([Append(delivery, [token(0)])])
            assert await asyncio.gather(*readers) == [[token(0)], [token(0)]]
    await redis.aclose()


async def test_log_that_cannot_be_read_is_its_own_readers_matter(
    queue: JobQueue, leases: JobLeases, reader: EventReader, redis: Redis, keys: RedisKeys
) -> None:
    delivery = await running_job(queue, leases, "good")
    await running_job(queue, leases, "bad")
    with reader.watch("good") as good, reader.watch("bad") as bad:
        await good.next(after=FIRST_EVENT, timeout_s=5)
        await redis.set(keys.events("bad"), "no stream")
        for index in range(3):
            following = asyncio.create_task(good.next(after=f"{index}-9", timeout_s=PATIENCE_S))
            with pytest.raises(ResponseError):
                await bad.next(after="0-1", timeout_s=PATIENCE_S)
            await leases.append([Append(delivery, [token(index)])])
            assert [event.event for event in await following] == [token(index)]


@pytest.mark.parametrize("seed", range(3))
async def test_every_reader_gets_every_token_once(
    seed: int, queue: JobQueue, leases: JobLeases, reader: EventReader
) -> None:
    """However the events arrive, and however slow a reader is."""
    chance = random.Random(seed)
    num_tokens, job_ids = 60, [f"j{i}" for i in range(6)]
    deliveries = [await running_job(queue, leases, job_id) for job_id in job_ids]

    async def read(job_id: str, chance: random.Random) -> list[int]:
        found: list[int] = []
        after = FIRST_EVENT
        with reader.watch(job_id) as watch:
            while True:
                events = await watch.next(after=after, timeout_s=chance.choice([0, 0.01, 5]))
                for logged in events:
                    event, after = logged.event, logged.id
                    if isinstance(event, TokenEvent):
                        found += event.token_ids
                    elif isinstance(event, DoneEvent | ErrorEvent):
                        return found
                await asyncio.sleep(chance.choice([0, 0, 0.002, 0.02]))

    readers = [
        asyncio.create_task(read(job_id, random.Random(f"{seed}{job_id}{copy}")))
        for job_id in job_ids
        for copy in range(3)
    ]
    places = dict.fromkeys(job_ids, 0)
    while any(place < num_tokens for place in places.values()):
        appends = []
        for delivery in deliveries:
            first = places[delivery.job_id]
            behind = min(num_tokens, first + chance.choice([0, 1, 1, 1, 3]))
            statuses = [StatusEvent(stage="prefilling")] if chance.random() < 0.1 else []
            shared = TokenEvent(index=first, text="", token_ids=list(range(first, behind)))
            appends.append(Append(delivery, [*statuses, shared] if behind > first else statuses))
            places[delivery.job_id] = behind
        await leases.append(appends)
        await asyncio.sleep(chance.choice([0, 0, 0.01]))
    await leases.append([Append(d, [], cancelled(d.job_id)) for d in deliveries])
    async with asyncio.timeout(PATIENCE_S):
        assert await asyncio.gather(*readers) == [list(range(num_tokens))] * len(readers)


async def test_watches_that_are_left_leave_nothing_behind(
    queue: JobQueue, leases: JobLeases, reader: EventReader
) -> None:
    await running_job(queue, leases)
    left = []
    for _ in range(20):
        with reader.watch("j") as watch:
            waiting = asyncio.create_task(watch.next(after="0-1", timeout_s=PATIENCE_S))
            await asyncio.sleep(0)
            waiting.cancel()
        left.append(weakref.ref(watch))
        await asyncio.gather(waiting, return_exceptions=True)
    del watch, waiting
    gc.collect()
    assert sum(ref() is not None for ref in left) <= 1  # the last one may still be at hand
