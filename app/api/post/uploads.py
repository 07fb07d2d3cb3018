"""Receives videos within a time limit, probes them and stores them by content; and deletes them,
with what is cached from them.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

from app.api.connection.drain import Drain
from app.api.post.second_try import SecondTryReaders
from app.errors import DeadlineExceededError, StoreUnavailableError, VideoNotFoundError
from app.keys.entries import Principal, cache_salt
from app.keys.limits import KeyLimits
from app.messages import cached_video
from app.store.forgotten_videos import ForgottenVideos
from app.store.usage import UsageLog
from app.video_store import FOREVER, Retention, StorageQuota, Upload, VideoLease, VideoStore


class Uploads:
    """
    Args:
        limits_of: the limits of a key.
        are_caches_shared: between owners.
        timeout_s: how long a body may take to come in and its video to be probed.
    """

    def __init__(
        self,
        videos: VideoStore,
        readers: SecondTryReaders,
        forgotten: ForgottenVideos,
        usage: UsageLog,
        drain: Drain,
        *,
        limits_of: Callable[[Principal], KeyLimits],
        are_caches_shared: bool,
        timeout_s: float,
    ) -> None:
        self._videos = videos
        self._readers = readers
        self._forgotten = forgotten
        self._usage = usage
        self._limits_of = limits_of
        self._are_caches_shared = are_caches_shared
        self._drain = drain
        self._timeout_s = timeout_s

    @asynccontextmanager
    async def limited(self) -> AsyncIterator[None]:
        """Bounds the block's time.

        Raises:
            DeadlineExceededError
            ShuttingDownError: the server cannot wait any longer.
        """
        try:
            async with self._drain.until_expired(), asyncio.timeout(self._timeout_s) as limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceededError(
                f"the request took longer to come in than the {self._timeout_s:g} s of "
                "DYCOKE_JOB_TIMEOUT_S"
            ) from None

    def receive(self, principal: Principal) -> AbstractAsyncContextManager[Upload]:
        return self._videos.receive(principal.owner)

    async def find(self, video_id: str, owner: str) -> VideoLease:
        """Raises: VideoNotFoundError."""
        return await self._videos.lease(video_id, owner)

    async def store(
        self, upload: Upload, principal: Principal, retention: Retention = FOREVER
    ) -> tuple[VideoLease, float]:
        """Stores an upload that the readers can read, unless its owner has its content already.
        Nothing is evicted for one that they cannot read.

        Another owner's copy does not save the probe: its time would reveal that someone has the
        video.

        Returns:
            The video, and the seconds that the probe took.

        Raises:
            VideoError: it is no video that we take; it is not stored.
        """
        owner = principal.owner
        video_id = await upload.finish()
        with suppress(VideoNotFoundError):
            return await self._videos.retain(video_id, owner, retention), 0.0
        probe, probe_s = await self._readers.probe(upload.path, owner)
        quota = self._quota_of(principal)
        lease = await self._videos.commit(upload, video_id, probe, owner, retention, quota)
        with suppress(StoreUnavailableError):  # then nothing of it is cached for a day
            await self._forgotten.keep(self._cached(video_id, owner))
            await self._usage.count_upload(owner, upload.num_bytes)
        return lease, probe_s

    async def delete(self, video_id: str, owner: str) -> None:
        """Deletes an owner's video, and what is cached of it unless others share that.

        Raises:
            VideoNotFoundError
            StoreUnavailableError: it is still there.
        """
        await self._videos.find(video_id, owner)
        await self._forget(video_id, owner)
        await self._videos.delete(video_id, owner)

    async def expire(self) -> None:
        """Deletes expired videos, with what is cached of them.

        Raises: StoreUnavailableError: the rest is deleted another time.
        """
        for video_id, owner in await self._videos.expired():
            await self._forget(video_id, owner)
            if not await self._videos.drop_expired(video_id, owner):
                await self._forgotten.keep(self._cached(video_id, owner))

    async def _forget(self, video_id: str, owner: str) -> None:
        if not (self._are_caches_shared and await self._videos.has_others(video_id, owner)):
            await self._forgotten.forget(self._cached(video_id, owner))

    def _quota_of(self, principal: Principal) -> StorageQuota:
        limits = self._limits_of(principal)  # 0: none
        return StorageQuota(limits.max_stored_bytes or None, limits.max_stored_videos or None)

    def _cached(self, video_id: str, owner: str) -> str:
        salt = cache_salt(owner, are_caches_shared=self._are_caches_shared)
        return cached_video(video_id, salt)
