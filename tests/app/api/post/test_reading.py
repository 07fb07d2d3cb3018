"""Jobs' frames on their way into the queue: one read for all who wait, failures, early ends."""

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from app.api.post.places import Place
from app.api.post.reading import FrameReading
from app.errors import ShuttingDownError
from app.messages import ErrorEvent, JobState
from app.store.event_log import EventLog
from app.store.frame_store import FrameStore
from app.store.job_queue import JobQueue
from app.store.keys import RedisKeys
from app.video_store import VideoStore
from dycoke_core.errors import UnreadableVideoError
from tests.app.api.post.accepted import accepted, stored
from tests.app.video_store.videos import OWNER
from tests.integration.api import FakeReaders, until
from tests.integration.jobs import MODEL, cancelled

PATIENCE_S = 30.0


async def all_read(reading: FrameReading) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await reading.wait_until_none()


async def last_error(log: EventLog, job_id: str = "j") -> str:
    event = await log.last(job_id)
    assert isinstance(event, ErrorEvent)
    return event.code


async def test_a_job_is_queued_with_its_frames_and_gives_its_video_back(
    queue: JobQueue, reading: FrameReading, videos: VideoStore, registry: CollectorRegistry
) -> None:
    video = await stored(videos)
    reading.start(await accepted(queue, video))
    assert reading.has("j")
    assert registry.get_sample_value("dycoke_reader_jobs") == 1
    await all_read(reading)
    record = await queue.get("j")
    assert record.state is JobState.QUEUED and record.request.frames is not None
    assert record.request.frames.indices == [0, 1] and not record.request.frames.is_cached
    await videos.delete(video.video.video_id, OWNER)
    assert not video.path.exists(), "no job holds it any more"
    assert registry.get_sample_value("dycoke_reader_jobs") == 0 and not reading.has("j")


async def test_a_job_without_a_video_is_queued_at_once(
    queue: JobQueue, reading: FrameReading, fake_readers: FakeReaders
) -> None:
    reading.start(await accepted(queue, None))
    await all_read(reading)
    assert (await queue.get("j")).state is JobState.QUEUED
    assert fake_readers.num_reads == 0


async def test_jobs_about_the_same_frames_share_one_read(
    queue: JobQueue, reading: FrameReading, videos: VideoStore, fake_readers: FakeReaders
) -> None:
    fake_readers.may_read.clear()
    for job_id in "abc":
        video = await stored(videos)
        reading.start(await accepted(queue, video, job_id))
    await until(lambda: fake_readers.num_reads == 1)
    fake_readers.may_read.set()
    await all_read(reading)
    records = [await queue.get(job_id) for job_id in "abc"]
    assert [record.state for record in records] == [JobState.QUEUED] * 3
    assert fake_readers.num_reads == 1
    assert len({record.request.frames.digest for record in records if record.request.frames}) == 1


async def test_a_shared_read_goes_on_while_one_of_its_jobs_waits(
    queue: JobQueue,
    log: EventLog,
    reading: FrameReading,
    videos: VideoStore,
    fake_readers: FakeReaders,
) -> None:
    fake_readers.may_read.clear()
    for job_id in "ab":
        reading.start(await accepted(queue, await stored(videos), job_id))
    async with asyncio.timeout(PATIENCE_S):
        while not any(event.type == "status" for event in await log.read("b")):
            await asyncio.sleep(0.001)  # it waits, too, once it has said so
    reading.cancel("a")
    await until(lambda: not reading.has("a"))
    assert fake_readers.num_cancelled == 0
    fake_readers.may_read.set()
    await all_read(reading)
    assert (await queue.get("b")).state is JobState.QUEUED


async def test_jobs_that_wait_for_anothers_transfer_give_up_together(
    queue: JobQueue,
    log: EventLog,
    reading: FrameReading,
    videos: VideoStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many they are: each waits no longer than if it had been the only one."""
    may_end = asyncio.Event()
    put_and_pin = FrameStore.put_and_pin

    async def hanging(store: FrameStore, *args: Any) -> None:
        await may_end.wait()
        await put_and_pin(store, *args)

    monkeypatch.setattr(FrameStore, "put_and_pin", hanging)
    monkeypatch.setattr("app.api.post.reading.CALL_TIMEOUT_S", 0.2)
    for job_id in "abc":
        reading.start(await accepted(queue, await stored(videos), job_id))
    await until(lambda: sum(map(reading.has, "abc")) == 1)
    (storing,) = [job_id for job_id in "abc" if reading.has(job_id)]
    for job_id in set("abc") - {storing}:
        assert await last_error(log, job_id) == "store_unavailable"
    may_end.set()
    await all_read(reading)
    assert (await queue.get(storing)).state is JobState.QUEUED


async def test_the_last_that_leaves_ends_the_read(
    queue: JobQueue, reading: FrameReading, videos: VideoStore, fake_readers: FakeReaders
) -> None:
    fake_readers.may_read.clear()
    reading.start(await accepted(queue, await stored(videos)))
    await until(lambda: fake_readers.num_reads == 1)
    reading.cancel("j")
    reading.cancel("none")
    await all_read(reading)
    assert fake_readers.num_cancelled == 1


async def test_what_the_readers_refuse_ends_the_job_with_its_code(
    queue: JobQueue,
    log: EventLog,
    reading: FrameReading,
    videos: VideoStore,
    fake_readers: FakeReaders,
) -> None:
    fake_readers.read_error = UnreadableVideoError("no reader could decode the video")
    reading.start(await accepted(queue, await stored(videos)))
    await all_read(reading)
    assert (await queue.get("j")).state is JobState.ERROR
    assert await last_error(log) == "unreadable_video"
    assert (await queue.depth(MODEL)).waiting == 0, "the place is free again"


async def test_a_bug_ends_its_job_alone_and_shows_nothing_of_itself(
    queue: JobQueue,
    log: EventLog,
    reading: FrameReading,
    videos: VideoStore,
    fake_readers: FakeReaders,
) -> None:
    fake_readers.read_error = KeyError("a secret")
    reading.start(await accepted(queue, await stored(videos)))
    await all_read(reading)
    event = await log.last("j")
    assert isinstance(event, ErrorEvent) and event.code == "internal_error"
    assert "secret" not in event.message


async def test_frames_that_are_another_readers_for_want_of_the_first_are_the_jobs_own(
    queue: JobQueue, reading: FrameReading, videos: VideoStore, fake_readers: FakeReaders
) -> None:
    fake_readers.fallback_cause = "killed"
    for job_id in "ab":
        reading.start(await accepted(queue, await stored(videos), job_id))
        await all_read(reading)
    digests = [
        frames.digest for job_id in "ab" if (frames := (await queue.get(job_id)).request.frames)
    ]
    assert len(set(digests)) == 2, "no other job should find them"


async def test_a_job_that_another_process_ends_is_read_no_further(
    queue: JobQueue,
    reading: FrameReading,
    videos: VideoStore,
    fake_readers: FakeReaders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.api.post.places.MAX_RENEW_S", 0.01)
    fake_readers.may_read.clear()
    reading.start(await accepted(queue, await stored(videos)))
    await until(lambda: fake_readers.num_reads == 1)
    assert await queue.end("j", JobState.CANCELLED, cancelled("j"))
    await all_read(reading)
    assert (await queue.get("j")).state is JobState.CANCELLED
    assert fake_readers.num_cancelled == 1


async def test_a_process_that_ends_leaves_its_jobs_to_others(
    queue: JobQueue,
    reading: FrameReading,
    videos: VideoStore,
    fake_readers: FakeReaders,
    redis: Redis,
    keys: RedisKeys,
) -> None:
    fake_readers.may_read.clear()
    reading.start(await accepted(queue, await stored(videos)))
    await until(lambda: fake_readers.num_reads == 1)
    await reading.aclose()
    assert (await queue.get("j")).state is JobState.READING
    assert [orphan.job_id for orphan in (await queue.sweep()).orphans] == ["j"]


async def test_a_place_is_no_longer_renewed_once_its_job_is_queued(
    queue: JobQueue, reading: FrameReading, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = []
    stop = Place.stop_renewing

    async def noted(place: Place) -> None:
        stopped.append(place.job_id)
        await stop(place)

    monkeypatch.setattr(Place, "stop_renewing", noted)
    reading.start(await accepted(queue, None))
    await all_read(reading)
    assert stopped == ["j"]


async def test_a_retryable_failure_is_told_as_one(
    queue: JobQueue,
    log: EventLog,
    reading: FrameReading,
    videos: VideoStore,
    fake_readers: FakeReaders,
) -> None:
    fake_readers.read_error = ShuttingDownError()
    reading.start(await accepted(queue, await stored(videos)))
    await all_read(reading)
    event = await log.last("j")
    assert isinstance(event, ErrorEvent) and event.retryable
