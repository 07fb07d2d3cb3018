"""Videos on their way in and out: probed before they are stored, forgotten when they go."""

import asyncio
from typing import cast

import pytest
from redis.asyncio import Redis

from app.api.connection.drain import Drain
from app.api.post.second_try import SecondTryReaders
from app.api.post.uploads import Uploads
from app.errors import (
    DeadlineExceededError,
    ShuttingDownError,
    StoreUnavailableError,
    UploadTooLargeError,
    VideoNotFoundError,
)
from app.keys.entries import Principal
from app.keys.limits import KeyLimits
from app.messages import cached_video
from app.store.forgotten_videos import ForgottenVideos
from app.store.keys import RedisKeys
from app.store.usage import UsageLog, today
from app.video_store import Retention, VideoLease, VideoStore
from dycoke_core.errors import UnreadableVideoError
from tests.integration.api import FakeReaders

ALICE, BOB = Principal("alice", "alice"), Principal("bob", "bob")


class Service:
    """Uploads, and what they use."""

    def __init__(
        self, videos: VideoStore, readers: SecondTryReaders, redis: Redis, keys: RedisKeys
    ) -> None:
        self._parts = (videos, readers)
        self.videos = videos
        self.drain = Drain()
        self.forgotten = ForgottenVideos(redis, keys)
        self.usage = UsageLog(redis, keys)
        self.limits = KeyLimits()

    def uploads(self, *, are_caches_shared: bool = False, timeout_s: float = 30.0) -> Uploads:
        return Uploads(
            *self._parts,
            self.forgotten,
            self.usage,
            self.drain,
            limits_of=lambda _: self.limits,
            are_caches_shared=are_caches_shared,
            timeout_s=timeout_s,
        )


@pytest.fixture
def service(
    videos: VideoStore, tried_readers: SecondTryReaders, redis: Redis, keys: RedisKeys
) -> Service:
    return Service(videos, tried_readers, redis, keys)


async def send(
    uploads: Uploads, content: bytes, who: Principal = ALICE, retention: Retention | None = None
) -> VideoLease:
    async with uploads.receive(who) as upload:
        await upload.write(content)
        lease, _ = await uploads.store(upload, who, retention or Retention())
        return lease


async def test_a_video_is_probed_once_for_each_owner(
    service: Service, fake_readers: FakeReaders
) -> None:
    uploads = service.uploads()
    first = await send(uploads, b"a video")
    again = await send(uploads, b"a video")
    assert fake_readers.num_probes == 1
    assert first.video.video_id == again.video.video_id
    await send(uploads, b"a video", BOB)
    assert fake_readers.num_probes == 2, "its time would reveal that somebody has it"
    (usage,) = await service.usage.read("alice", [today()])
    assert usage == {"uploads": 1, "upload_bytes": 7}


async def test_what_no_reader_can_read_is_not_stored(
    service: Service, fake_readers: FakeReaders
) -> None:
    fake_readers.probe_error = UnreadableVideoError("no")
    uploads = service.uploads()
    with pytest.raises(UnreadableVideoError):
        await send(uploads, b"no video")
    assert await service.videos.page("alice", limit=10) == ([], False)


async def test_an_owners_quota_is_its_limits(service: Service) -> None:
    service.limits = KeyLimits(max_stored_bytes=10, max_stored_videos=0)
    uploads = service.uploads()
    first = await send(uploads, b"12345678")
    first.release()
    second = await send(uploads, b"abcdefgh")
    second.release()
    with pytest.raises(VideoNotFoundError):
        await uploads.find(first.video.video_id, "alice")
    with pytest.raises(UploadTooLargeError):
        await send(uploads, b"more than ten bytes")


async def test_a_video_that_is_deleted_is_forgotten_everywhere(service: Service) -> None:
    uploads = service.uploads()
    assert await service.forgotten.news() == []
    lease = await send(uploads, b"a video")
    lease.release()
    video_id = lease.video.video_id
    with pytest.raises(VideoNotFoundError):
        await uploads.delete(video_id, "bob")
    assert await service.forgotten.news() == []
    await uploads.delete(video_id, "alice")
    assert await service.forgotten.news() == [cached_video(video_id, "alice")]
    with pytest.raises(VideoNotFoundError):
        await uploads.find(video_id, "alice")


async def test_shared_caches_forget_with_the_last_owner(service: Service) -> None:
    uploads = service.uploads(are_caches_shared=True)
    await service.forgotten.news()
    video_id = ""
    for who in (ALICE, BOB):
        lease = await send(uploads, b"a video", who)
        lease.release()
        video_id = lease.video.video_id
    await uploads.delete(video_id, "alice")
    assert await service.forgotten.news() == []
    await uploads.delete(video_id, "bob")
    assert await service.forgotten.news() == [cached_video(video_id, "")]


async def test_what_has_expired_goes_with_what_is_kept_of_it(service: Service) -> None:
    uploads = service.uploads()
    await service.forgotten.news()
    for content, ends_at_s in ((b"over", 1.0), (b"stays", 1e12)):
        (await send(uploads, content, retention=Retention(ends_at_s))).release()
    (over,) = await service.videos.expired()
    await uploads.expire()
    assert await service.videos.expired() == []
    assert await service.forgotten.news() == [cached_video(*over)]
    (left,), _ = await service.videos.page("alice", limit=10)
    assert left.num_bytes == len(b"stays")


class Away:
    async def keep(self, video: str) -> None:
        raise StoreUnavailableError("away")

    forget = keep


async def test_without_redis_a_video_is_stored_and_none_is_deleted(service: Service) -> None:
    service.forgotten = cast(ForgottenVideos, Away())
    uploads = service.uploads()
    lease = await send(uploads, b"a video")
    with pytest.raises(StoreUnavailableError):
        await uploads.delete(lease.video.video_id, "alice")
    assert (await uploads.find(lease.video.video_id, "alice")).path.exists()


async def test_a_body_has_a_time_limit_and_ends_with_the_process(service: Service) -> None:
    with pytest.raises(DeadlineExceededError, match="longer to come in"):
        async with service.uploads(timeout_s=0.01).limited():
            await asyncio.Event().wait()
    with pytest.raises(TimeoutError):
        async with service.uploads().limited(), asyncio.timeout(0.01):
            await asyncio.Event().wait()
    service.drain.expire()
    with pytest.raises(ShuttingDownError):
        async with service.uploads().limited():
            await asyncio.Event().wait()
