"""Jobs whose reader is gone: adopted once, by an API that has the video, or ended."""

import asyncio

import pytest

from app.api.connection.drain import Drain
from app.api.post.orphans import Orphans
from app.api.post.reading import FrameReading
from app.messages import ErrorEvent, JobState
from app.store.event_log import EventLog
from app.store.job_queue import JobQueue, Orphan
from app.video_store import VideoStore
from tests.app.api.post.accepted import LEASE_S, accepted, stored
from tests.app.video_store.videos import OWNER
from tests.integration.api import FakeReaders, until
from tests.integration.jobs import MODEL

ORPHAN = Orphan(MODEL, "j")


@pytest.fixture
def drain() -> Drain:
    return Drain()


@pytest.fixture
def orphans(queue: JobQueue, videos: VideoStore, reading: FrameReading, drain: Drain) -> Orphans:
    return Orphans(queue, videos, reading, drain, lease_s=LEASE_S, read_timeout_s=30.0)


async def abandoned(queue: JobQueue, videos: VideoStore | None) -> None:
    """A job whose API is gone before it was read."""
    video = await stored(videos) if videos is not None else None
    reading = await accepted(queue, video)
    await reading.place.abandon()
    if video is not None:
        video.release()


async def all_read(reading: FrameReading) -> None:
    async with asyncio.timeout(30):
        await reading.wait_until_none()


async def test_an_orphan_is_read_by_who_has_its_video(
    queue: JobQueue, videos: VideoStore, reading: FrameReading, orphans: Orphans
) -> None:
    await abandoned(queue, videos)
    await orphans.adopt(ORPHAN)
    assert reading.has("j")
    await all_read(reading)
    record = await queue.get("j")
    assert record.state is JobState.QUEUED and record.request.frames is not None


async def test_an_orphan_without_a_video_is_queued(
    queue: JobQueue, reading: FrameReading, orphans: Orphans
) -> None:
    await abandoned(queue, None)
    await orphans.adopt(ORPHAN)
    await all_read(reading)
    assert (await queue.get("j")).state is JobState.QUEUED


async def test_only_one_adopts_it(
    queue: JobQueue,
    videos: VideoStore,
    reading: FrameReading,
    orphans: Orphans,
    fake_readers: FakeReaders,
) -> None:
    fake_readers.may_read.clear()
    await abandoned(queue, videos)
    await orphans.adopt(ORPHAN)
    await until(lambda: fake_readers.num_reads == 1)
    await orphans.adopt(ORPHAN)  # its own already
    assert await queue.adopt(ORPHAN, lease_s=LEASE_S) is None, "another API is too late"
    assert fake_readers.num_reads == 1


async def test_an_orphan_whose_video_is_gone_is_ended(
    queue: JobQueue, log: EventLog, videos: VideoStore, orphans: Orphans, reading: FrameReading
) -> None:
    await abandoned(queue, videos)
    record = await queue.get("j")
    assert record.request.video_id is not None
    await videos.delete(record.request.video_id, OWNER)
    await orphans.adopt(ORPHAN)
    assert not reading.has("j")
    event = await log.last("j")
    assert isinstance(event, ErrorEvent) and event.code == "reader_lost" and event.retryable
    assert (await queue.depth(MODEL)).waiting == 0


async def test_an_orphan_that_has_ended_meanwhile_is_nobodys(
    queue: JobQueue, videos: VideoStore, reading: FrameReading, orphans: Orphans
) -> None:
    await abandoned(queue, videos)
    event = ErrorEvent(code="x", message="x", retryable=False, job_id="j")
    await queue.end("j", JobState.ERROR, event)
    await orphans.adopt(ORPHAN)
    assert not reading.has("j")


async def test_who_is_shutting_down_adopts_nobody(
    queue: JobQueue, videos: VideoStore, reading: FrameReading, orphans: Orphans, drain: Drain
) -> None:
    await abandoned(queue, videos)
    drain.begin()
    await orphans.adopt(ORPHAN)
    assert not reading.has("j")
    assert [orphan.job_id for orphan in (await queue.sweep()).orphans] == ["j"]
