"""Clients' own names for videos (`uuid`), each valid only among one owner's videos.

An alias finds a video but is never the key of a cache: caches go by content. A request may bring
one and still make no job, so each owner's number of aliases has a bound of its own.
"""

import time
from hashlib import sha256
from typing import Any

from redis.asyncio import Redis

from app.store.client import milliseconds, store_call
from app.store.keys import RedisKeys

ALIAS_TTL_S = 24 * 3600.0  # since it was used last
MAX_ALIASES = 10_000  # of an owner; of more the least recently used go


class VideoAliases:
    """Every method raises `StoreUnavailableError` when Redis does not answer."""

    def __init__(self, redis: Redis, keys: RedisKeys) -> None:
        self._redis = redis
        self._keys = keys

    async def note(self, owner: str, alias: str, video_id: str) -> None:
        """Gives a name to a video; the last one that comes under a name keeps it."""
        alias_hash, owned, now_s = _hash(owner, alias), self._keys.aliases(owner), time.time()
        async with store_call(), self._redis.pipeline(transaction=True) as pipeline:
            ttl_ms = milliseconds(ALIAS_TTL_S)
            pipeline.set(self._keys.alias(alias_hash), video_id, px=ttl_ms)
            pipeline.zadd(owned, {alias_hash: now_s})
            pipeline.pexpire(owned, ttl_ms)
            pipeline.zremrangebyscore(owned, "-inf", now_s - ALIAS_TTL_S)
            pipeline.zrange(owned, 0, -MAX_ALIASES - 1)
            *_, surplus = await pipeline.execute()
            if surplus:
                pipeline.unlink(*(self._keys.alias(name.decode()) for name in surplus))
                pipeline.zrem(owned, *surplus)
                await pipeline.execute()

    async def find(self, owner: str, alias: str) -> str | None:
        async with store_call():
            video_id: Any = await self._redis.get(self._keys.alias(_hash(owner, alias)))
        return None if video_id is None else str(video_id.decode())


def _hash(owner: str, alias: str) -> str:
    return sha256(f"{owner}\0{alias}".encode()).hexdigest()
