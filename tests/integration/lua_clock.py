"""A clock that a test sets, for the scripts of the store.

How long an entry of a stream has been idle, and when a key expires, stay Redis' own business.
"""

from hashlib import sha1

import pytest
from redis.asyncio import Redis

from app.store.client import load_script
from app.store.keys import RedisKeys

_NOW = """local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end"""
_SET = """local function now_ms() return tonumber(redis.call('GET', PREFIX .. ':clock')) end"""


class LuaClock:
    def __init__(self, redis: Redis, keys: RedisKeys) -> None:
        self._redis = redis
        self._key = f"{keys.prefix}:clock"

    @classmethod
    async def start(
        cls, redis: Redis, keys: RedisKeys, monkeypatch: pytest.MonkeyPatch
    ) -> "LuaClock":
        monkeypatch.setattr("app.store.client.load_script", _load)
        clock = cls(redis, keys)
        seconds, _ = await redis.time()
        await redis.set(clock._key, int(seconds) * 1000)
        return clock

    async def advance(self, seconds: float) -> None:
        await self._redis.incrby(self._key, round(seconds * 1000))


def _load(name: str) -> tuple[str, str]:
    source, _ = load_script(name)
    assert _NOW in source or "now_ms()" not in source
    source = source.replace(_NOW, _SET)
    return source, sha1(source.encode(), usedforsecurity=False).hexdigest()
