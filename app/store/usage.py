"""How much each key's holder used the service, by day (UTC), for `USAGE_DAYS` in Lua's prelude.

Jobs count once, in the script that ends them. Uploads count where they are stored, unless Redis is
down just then.
"""

import time
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from app.store.client import store_call
from app.store.keys import RedisKeys

DAY_S = 24 * 3600
USAGE_DAYS = 92
UPLOADS, UPLOAD_BYTES = "uploads", "upload_bytes"


class UsageLog:
    """Every method raises `StoreUnavailableError` when Redis does not answer."""

    def __init__(self, redis: Redis, keys: RedisKeys) -> None:
        self._redis = redis
        self._keys = keys

    async def count_upload(self, owner: str, num_bytes: int) -> None:
        key = self._key(owner, today())
        async with store_call(), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hincrby(key, UPLOADS, 1)
            pipeline.hincrby(key, UPLOAD_BYTES, num_bytes)
            pipeline.expire(key, USAGE_DAYS * DAY_S)
            await pipeline.execute()

    async def read(self, owner: str, days: Sequence[int]) -> list[dict[str, int]]:
        """The counts of each of these days (days since 1970)."""
        async with store_call(), self._redis.pipeline(transaction=False) as pipeline:
            for day in days:
                pipeline.hgetall(self._key(owner, day))
            replies: list[Any] = await pipeline.execute()
        return [{name.decode(): int(count) for name, count in reply.items()} for reply in replies]

    def _key(self, owner: str, day: int) -> str:
        return self._keys.usage(f"{owner}:{day}")


def today() -> int:
    """The day's number since 1970."""
    return int(time.time() // DAY_S)
