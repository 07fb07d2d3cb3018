"""Deletes everything that is cached from deleted videos.

Their frames are here; their features and prefixes are in workers, which read the news. Videos have
the names that `app.messages.cached_video` gives them.
"""

from typing import Any

from redis.asyncio import Redis

from app.store.client import Scripts, store_call
from app.store.keys import RedisKeys

MAX_NEWS = 1000  # at a time; the rest comes with the next call


class ForgottenVideos:
    """Every method raises `StoreUnavailableError` when Redis does not answer."""

    def __init__(self, redis: Redis, keys: RedisKeys) -> None:
        self._redis = redis
        self._keys = keys
        self._scripts = Scripts(redis, keys.prefix)
        self._read_to: str | None = None

    async def forget(self, video: str) -> None:
        """Deletes what is cached of a video; what a live job needs is deleted when the job ends."""
        await self._scripts.run("forget_video", video)

    async def keep(self, video: str) -> None:
        """Notes that a video exists again: what jobs make of it is cached from now on."""
        async with store_call():
            await self._redis.zrem(self._keys.forgotten, video)

    async def news(self) -> list[str]:
        """The videos to forget since the last call; the first call is when a worker starts, which
        knows none yet.
        """
        async with store_call():
            if self._read_to is None:
                seconds, microseconds = await self._redis.time()
                just_before_ms = seconds * 1000 + microseconds // 1000 - 1
                self._read_to = f"{just_before_ms}-0"
            reply: Any = await self._redis.xread(
                {self._keys.forgettings: self._read_to}, count=MAX_NEWS
            )
        entries = [entry for _, entries in reply for entry in entries]
        if entries:
            self._read_to = entries[-1][0].decode()
        return [fields[b"video"].decode() for _, fields in entries]
