"""Reading events, from any point."""

import pytest
from redis.asyncio import Redis

from app.errors import JobNotFoundError
from app.messages import JobEvent, TokenEvent
from app.store.event_log import MAX_EVENTS_PER_READ, EventLog, parse_event_id
from app.store.job_leases import Append, JobLeases
from app.store.job_queue import JobQueue
from app.store.keys import RedisKeys
from dycoke_core.errors import InvalidRequestError
from tests.integration.jobs import MODEL, make_request, submit, take, token


async def test_resuming_misses_and_repeats_nothing(
    queue: JobQueue, leases: JobLeases, log: EventLog
) -> None:
    await submit(queue, "j")
    delivery = await take(leases)
    await leases.append([Append(delivery, [token(i) for i in range(4)])])
    everything = await log.read("j")
    assert [logged.event for logged in everything[1:]] == [token(i) for i in range(4)]
    assert isinstance(everything[0].event, JobEvent)
    for seen, logged in enumerate(everything):
        assert await log.read("j", after=logged.id) == everything[seen + 1 :]


async def test_read_returns_at_most_a_page(
    queue: JobQueue, leases: JobLeases, log: EventLog
) -> None:
    await submit(queue, "j")
    delivery = await take(leases)
    num_tokens = MAX_EVENTS_PER_READ + 10
    await leases.append([Append(delivery, [token(i) for i in range(num_tokens)])])
    after, indices = "0-1", []
    while page := await log.read("j", after=after):
        assert len(page) <= MAX_EVENTS_PER_READ
        indices += [e.event.index for e in page if isinstance(e.event, TokenEvent)]
        after = page[-1].id
    assert indices == list(range(num_tokens))


async def test_log_of_an_unknown_job_is_not_found(log: EventLog) -> None:
    with pytest.raises(JobNotFoundError):
        await log.read("none")


async def test_job_without_events_has_none_yet(
    queue: JobQueue, log: EventLog, redis: Redis, keys: RedisKeys
) -> None:
    await queue.reserve(MODEL, "j", max_jobs=1, lease_s=30)
    await queue.create(make_request("j"))
    await redis.delete(keys.events("j"))
    assert await log.read("j") == []


@pytest.mark.parametrize("text", ["0-0", "12-3", "4294967295-0"])
def test_event_ids_of_ours_are_taken(text: str) -> None:
    assert parse_event_id(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "$",
        "-",
        "+",
        "1",
        "1-",
        "(1-0",
        "1-0 ",
        "a-0",
        "99999999999-0",
        "1-0\n",
        "\u0661-\u0660",
    ],
)
def test_other_event_ids_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse_event_id(text)
