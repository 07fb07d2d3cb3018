"""One reader's feed: every durable event once and in order, statuses only while they are news."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import cast

import pytest
from redis.asyncio import Redis

from app.api.answer import feed as feed_module
from app.api.answer.feed import FeedItem, JobFeed, final_event
from app.errors import StoreUnavailableError
from app.messages import DoneEvent, ErrorEvent, JobState, StatusEvent, TokenEvent
from app.store.event_log import FIRST_EVENT, LoggedEvent
from app.store.event_reader import EventReader, Watch
from app.store.job_leases import Append, JobLeases
from app.store.job_queue import JobQueue
from app.store.keys import RedisKeys
from tests.integration.api import receipt
from tests.integration.jobs import cancelled, finish, say, start, submit, take, token

PATIENCE_S = 30.0


async def feed_of(
    queue: JobQueue, reader: EventReader, *, after: str = FIRST_EVENT, heartbeat_s: float = 60.0
) -> JobFeed:
    return JobFeed(queue, reader, await queue.get("j"), after=after, heartbeat_s=heartbeat_s)


async def items_of(feed: JobFeed) -> list[FeedItem]:
    """All that a feed brings."""
    async with asyncio.timeout(PATIENCE_S):
        return [item async for batch in feed.batches() for item in batch]


async def test_a_feed_begins_with_the_log_and_ends_with_the_job(
    queue: JobQueue, leases: JobLeases, reader: EventReader
) -> None:
    await submit(queue, "j")
    delivery = await start(leases)
    await say(leases, delivery, 0, 1)
    following = asyncio.create_task(items_of(await feed_of(queue, reader)))
    await asyncio.sleep(0)
    await say(leases, delivery, 2)
    await finish(leases, delivery)
    items = await following
    assert items[0].type == "job" and items[-1].type == "error"
    tokens = [item.event for item in items if item.type == "token"]
    ids = [i for event in tokens if isinstance(event, TokenEvent) for i in event.token_ids]
    assert ids == [100, 101, 102]
    durable = [item.durable_id for item in items if item.type != "status"]
    assert None not in durable and len(set(durable)) == len(durable)


async def test_a_reader_that_comes_back_gets_what_follows_what_it_has_seen(
    queue: JobQueue, leases: JobLeases, reader: EventReader
) -> None:
    await submit(queue, "j")
    delivery = await start(leases)
    await say(leases, delivery, 0, 1)
    await finish(leases, delivery)
    everything = await items_of(await feed_of(queue, reader))
    for seen in everything[:-1]:
        assert seen.durable_id is not None
        rest = await items_of(await feed_of(queue, reader, after=seen.durable_id))
        assert rest == everything[everything.index(seen) + 1 :]
    last = everything[-1].durable_id
    assert last is not None
    assert await items_of(await feed_of(queue, reader, after=last)) == []


async def test_a_status_that_something_follows_is_left_out(
    queue: JobQueue, leases: JobLeases, reader: EventReader
) -> None:
    await submit(queue, "j")
    delivery = await start(leases)
    for progress in (0.2, 0.4):
        status = StatusEvent(stage="encoding", progress=progress)
        await leases.append([Append(delivery, [status])])
    batches = (await feed_of(queue, reader)).batches()
    async with asyncio.timeout(PATIENCE_S):
        first = await anext(batches)
    events = [item.event for item in first if item.type == "status"]
    assert [event.progress for event in events if isinstance(event, StatusEvent)] == [0.4]
    assert first[-1].durable_id is None
    await batches.aclose()


async def test_a_job_that_waits_says_where_in_the_queue_it_stands(
    queue: JobQueue, leases: JobLeases, reader: EventReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "POSITION_POLL_S", 0.01)
    for job_id in ("before", "j"):
        await submit(queue, job_id)
    positions: list[int | None] = []
    async with asyncio.timeout(PATIENCE_S):
        async for batch in (await feed_of(queue, reader)).batches():
            for event in (item.event for item in batch):
                if isinstance(event, StatusEvent) and event.stage == "queued":
                    positions.append(event.position)
                    if event.position == 1:
                        await take(leases)
                    elif event.position == 0:
                        await queue.end("j", JobState.CANCELLED, cancelled("j"))
    assert positions == [1, 0]


async def test_a_stream_that_waits_reads_no_request(
    queue: JobQueue, reader: EventReader, redis: Redis, keys: RedisKeys
) -> None:
    """It may have hundreds of thousands of characters, and hundreds of streams may wait."""
    await submit(queue, "before")
    await submit(queue, "j")
    feed = await feed_of(queue, reader)
    await redis.hset(keys.job("j"), "request", "not read")
    async with asyncio.timeout(PATIENCE_S):
        async for batch in feed.batches():
            if any(isinstance(e := item.event, StatusEvent) and e.position == 1 for item in batch):
                await queue.end("j", JobState.CANCELLED, cancelled("j"))
    assert isinstance(batch[-1].event, ErrorEvent) and batch[-1].event.code == "cancelled"


async def test_silence_is_an_empty_batch(queue: JobQueue, reader: EventReader) -> None:
    await submit(queue, "j")
    batches = (await feed_of(queue, reader, heartbeat_s=0.01)).batches()
    async with asyncio.timeout(PATIENCE_S):
        while await anext(batches):
            pass
    await batches.aclose()


async def test_a_record_that_is_gone_ends_the_feed(
    queue: JobQueue, reader: EventReader, redis: Redis, keys: RedisKeys
) -> None:
    await submit(queue, "j")
    feed = await feed_of(queue, reader, heartbeat_s=0.01)
    await redis.delete(keys.job("j"), keys.events("j"))
    last = (await items_of(feed))[-1].event
    assert isinstance(last, ErrorEvent) and (last.code, last.retryable) == ("job_lost", True)


class Outage:
    """A reader whose waits fail this many times, then bring a job's end."""

    def __init__(self, num_failures: int) -> None:
        self.num_left = num_failures

    def watch(self, job_id: str) -> "Outage":
        return self

    def __enter__(self) -> Watch:
        return cast(Watch, self)

    def __exit__(self, *exc_info: object) -> None:
        pass

    async def next(self, *, after: str, timeout_s: float) -> list[LoggedEvent]:
        if self.num_left:
            self.num_left -= 1
            raise StoreUnavailableError("away")
        return [LoggedEvent("9-0", cancelled("j").model_dump_json().encode())]


async def test_an_outage_is_sat_out_until_the_deadline(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "RETRY_S", 0.0)
    await submit(queue, "j")
    outage = Outage(5)
    items = await items_of(await feed_of(queue, cast(EventReader, outage)))
    assert [item.type for item in items] == ["error"] and outage.num_left == 0


async def test_an_outage_beyond_the_deadline_ends_the_feed(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "RETRY_S", 0.0)
    monkeypatch.setattr(feed_module, "MIN_PATIENCE_S", 0.0)
    request = await submit(queue, "j", timeout_s=0.0)
    assert request.deadline_at_s <= time.time()
    items = await items_of(await feed_of(queue, cast(EventReader, Outage(10**9))))
    last = items[-1].event
    assert isinstance(last, ErrorEvent) and last.code == "store_unavailable"
    assert last.job_id == "j" and last.retryable


async def test_an_answer_in_one_piece_is_how_its_feed_ends(
    queue: JobQueue, leases: JobLeases, reader: EventReader
) -> None:
    await submit(queue, "j")
    delivery = await start(leases)
    await leases.append([Append(delivery, [token(0)], receipt(delivery, 1))])
    final = await final_event((await feed_of(queue, reader)).batches())
    assert isinstance(final, DoneEvent) and final.usage.completion_tokens == 1


async def test_the_last_event_counts_where_empty_batches_come_between() -> None:
    closed = []

    async def batches() -> AsyncGenerator[Sequence[FeedItem], None]:
        try:
            yield [FeedItem.of(token(0), "1-0")]
            yield []
            yield [FeedItem.of(token(1), "2-0"), FeedItem.of(cancelled("j"), "3-0")]
            yield []
        finally:
            closed.append(True)

    final = await final_event(batches())
    assert isinstance(final, ErrorEvent) and final.code == "cancelled" and closed == [True]
