"""The secret that links are signed with: one per deployment, made by the first API that needs it.

It is in Redis, like everything that several APIs must agree on, and is read for every link. So if
Redis loses it, the links given out so far stop working, and nothing else does.
"""

import secrets
from typing import Any

from redis.asyncio import Redis

from app.store.client import store_call
from app.store.keys import RedisKeys

SECRET_BYTES = 32


class LinkSecret:
    def __init__(self, redis: Redis, keys: RedisKeys) -> None:
        self._redis = redis
        self._key = keys.link_secret

    async def get(self) -> bytes:
        """Raises: StoreUnavailableError."""
        async with store_call():
            secret: Any = await self._redis.get(self._key)
            if secret is None:
                await self._redis.set(self._key, secrets.token_bytes(SECRET_BYTES), nx=True)
                secret = await self._redis.get(self._key)
        return bytes(secret)
