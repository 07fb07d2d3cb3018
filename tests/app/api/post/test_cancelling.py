"""Jobs that are cancelled: on request, in the background, after a creation that may have failed."""

import asyncio

import pytest

from app.api.post import cancelling
from app.api.post.cancelling import Cancellations
from app.api.post.reading import FrameReading
from app.errors import JobNotFoundError, StoreUnavailableError
from app.messages import ErrorEvent, JobState
from app.store.event_log import EventLog
from app.store.job_queue import Idempotency, JobQueue
from app.video_store import VideoStore
from tests.app.api.post.accepted import accepted, stored
from tests.integration.api import FakeReaders, until
from tests.integration.jobs import MODEL, make_request, submit

PATIENCE_S = 30.0


async def all_done(cancellations: Cancellations) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await cancellations.wait_until_none()


async def test_a_job_is_cancelled_once_and_says_why(
    queue: JobQueue, log: EventLog, cancellations: Cancellations
) -> None:
    await submit(queue, "j")
    assert await cancellations.cancel("j", "as the client asked")
    assert not await cancellations.cancel("j", "again")
    assert (await queue.get("j")).state is JobState.CANCELLED
    event = await log.last("j")
    assert isinstance(event, ErrorEvent)
    assert (event.code, event.message) == ("cancelled", "as the client asked")
    with pytest.raises(JobNotFoundError):
        await cancellations.cancel("none", "as the client asked")


async def test_a_cancelled_jobs_reader_is_stopped(
    queue: JobQueue,
    cancellations: Cancellations,
    reading: FrameReading,
    videos: VideoStore,
    fake_readers: FakeReaders,
) -> None:
    fake_readers.may_read.clear()
    reading.start(await accepted(queue, await stored(videos)))
    await until(lambda: fake_readers.num_reads == 1)
    cancellations.start("j", "the client closed the connection")
    await all_done(cancellations)
    await until(lambda: not reading.has("j"))
    assert fake_readers.num_cancelled == 1
    assert (await queue.get("j")).state is JobState.CANCELLED


async def adopted_job(queue: JobQueue) -> None:
    """A job that a second request with its idempotency key has found."""
    idempotency = Idempotency("hash", "fingerprint", 60.0)
    for job_id in ("j", "again"):
        await queue.reserve(MODEL, job_id, max_jobs=10, lease_s=30)
        created = await queue.create(make_request(job_id), idempotency=idempotency)
        assert created.job_id == "j"


async def test_a_job_that_a_later_request_has_found_is_spared(
    queue: JobQueue, cancellations: Cancellations
) -> None:
    await adopted_job(queue)
    assert not await cancellations.cancel("j", "the client left", unless_adopted=True)
    assert (await queue.get("j")).state is JobState.READING
    assert await cancellations.cancel("j", "it was asked for")


class AwayAtFirst:
    """A queue's `end` that fails this many times before it works."""

    def __init__(self, queue: JobQueue, num_failures: int) -> None:
        self._end = queue.end
        self.num_left = num_failures

    async def __call__(self, *arguments: object, **options: object) -> bool:
        if self.num_left:
            self.num_left -= 1
            raise StoreUnavailableError("away")
        return await self._end(*arguments, **options)  # type: ignore[arg-type]


async def test_a_cancellation_outlives_an_outage(
    queue: JobQueue, cancellations: Cancellations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancelling, "RETRY_S", 0.001)
    await submit(queue, "j")
    away = AwayAtFirst(queue, 3)
    monkeypatch.setattr(queue, "end", away)
    cancellations.start("j", "the client closed the connection")
    await all_done(cancellations)
    assert away.num_left == 0
    assert (await queue.get("j")).state is JobState.CANCELLED


async def test_an_outage_without_end_is_given_up(
    queue: JobQueue, cancellations: Cancellations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancelling, "RETRY_S", 0.001)
    monkeypatch.setattr(cancelling, "PATIENCE_S", 0.02)
    await submit(queue, "j")
    monkeypatch.setattr(queue, "end", AwayAtFirst(queue, 10**9))
    cancellations.start("j", "the client closed the connection")
    await all_done(cancellations)
    assert (await queue.get("j")).state is JobState.QUEUED


async def test_a_creation_that_nobody_saw_end_leaves_neither_job_nor_place(
    queue: JobQueue, log: EventLog, cancellations: Cancellations
) -> None:
    away = StoreUnavailableError("Redis did not answer")
    created = await accepted(queue, None, "created")
    await queue.reserve(MODEL, "not-created", max_jobs=10, lease_s=30)
    cancellations.retract(created.request, away)
    cancellations.retract(make_request("not-created"), away)
    await all_done(cancellations)
    event = await log.last("created")
    assert isinstance(event, ErrorEvent) and event.code == "store_unavailable"
    assert (await queue.depth(MODEL)).waiting == 0


async def test_one_that_a_retry_has_found_is_left_to_whoever_reads_it(
    queue: JobQueue, cancellations: Cancellations
) -> None:
    await adopted_job(queue)
    cancellations.retract(make_request("j"), StoreUnavailableError("away"))
    await all_done(cancellations)
    assert (await queue.get("j")).state is JobState.READING
    assert [orphan.job_id for orphan in (await queue.sweep()).orphans] == ["j"]
