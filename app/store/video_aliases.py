"""Clients' own names for videos (`uuid`), each valid only among one owner's videos.

An alias finds a video but is never the key of a cache: caches go by content.
"""

from hashlib import sha256
from typing import Any

from redis.asyncio import Redis

from app.store.client import milliseconds, store_call
from app.store.keys import RedisKeys

ALIAS_TTL_S = 24 * 3600.0  # since it was used last


class VideoAliases:
    """Every method raises `StoreUnavailableError` when Redis does not answer."""

    def __init__(self, redis: Redis, keys: RedisKeys) -> None:
        self._redis = redis
        self._keys = keys

    async def note(self, owner: str, alias: str, video_id: str) -> None:
        """Gives a name to a video; the last one that comes under a name keeps it."""
        async with store_call():
            await self._redis.set(self._key(owner, alias), video_id, px=milliseconds(ALIAS_TTL_S))

    async def find(self, owner: str, alias: str) -> str | None:
        async with store_call():
            video_id: Any = await self._redis.get(self._key(owner, alias))
        return None if video_id is None else str(video_id.decode())

    def _key(self, owner: str, alias: str) -> str:
        return self._keys.alias(sha256(f"{owner}\0{alias}".encode()).hexdigest())
