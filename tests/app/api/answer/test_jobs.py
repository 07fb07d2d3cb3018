"""Jobs by id: whose they are, how they ended, what of them is still to be read."""

import pytest
from redis.asyncio import Redis

from app.api.answer.jobs import Jobs
from app.errors import JobNotFoundError
from app.keys.entries import ANONYMOUS
from app.messages import ErrorEvent, JobState
from app.store.event_log import EventLog
from app.store.job_queue import JobQueue
from app.store.keys import RedisKeys
from tests.integration.jobs import cancelled, submit


async def test_a_job_is_found_by_its_owner_alone(jobs: Jobs, queue: JobQueue) -> None:
    await submit(queue, "j")
    assert (await jobs.find("j", ANONYMOUS)).job_id == "j"
    for job_id, owner in (("j", "somebody else"), ("none", ANONYMOUS)):
        with pytest.raises(JobNotFoundError, match="no job of yours"):
            await jobs.find(job_id, owner)


@pytest.mark.parametrize("job_id", ["", "a" * 65, "a:b", "../j", "j\n"])
async def test_what_can_be_no_id_is_not_looked_up(
    jobs: Jobs, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs.queue, "get", None)
    with pytest.raises(JobNotFoundError):
        await jobs.find(job_id, ANONYMOUS)


async def test_frames_are_those_of_the_jobs_own_video(jobs: Jobs, queue: JobQueue) -> None:
    await submit(queue, "j")
    assert (await jobs.frames("j", "video", ANONYMOUS)).digest == "frames"
    for video_id, owner in (("another", ANONYMOUS), ("video", "somebody else")):
        with pytest.raises(JobNotFoundError):
            await jobs.frames("j", video_id, owner)


async def test_how_a_job_ended_is_known_at_its_end(
    jobs: Jobs, queue: JobQueue, log: EventLog
) -> None:
    await submit(queue, "j")
    record = await queue.get("j")
    assert await jobs.final(record) is None
    assert not await jobs.is_read_to_its_end(record, after="0-0")
    await queue.end("j", JobState.CANCELLED, cancelled("j"))
    record = await queue.get("j")
    final = await jobs.final(record)
    assert isinstance(final, ErrorEvent) and final.code == "cancelled"
    last = (await log.read("j"))[-1].id
    assert await jobs.is_read_to_its_end(record, after=last)
    assert not await jobs.is_read_to_its_end(record, after="0-0")


async def test_events_that_are_gone_are_told_as_lost(
    jobs: Jobs, queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    await submit(queue, "j")
    await queue.end("j", JobState.CANCELLED, cancelled("j"))
    await redis.delete(keys.events("j"))
    final = await jobs.final(await queue.get("j"))
    assert isinstance(final, ErrorEvent) and (final.code, final.retryable) == ("job_lost", True)
