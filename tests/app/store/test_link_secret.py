"""The secret that links are signed with."""

import asyncio

from redis.asyncio import Redis

from app.store.keys import RedisKeys
from app.store.link_secret import SECRET_BYTES, LinkSecret


async def test_all_processes_agree_on_one_whoever_asks_first(redis: Redis, keys: RedisKeys) -> None:
    secrets = [LinkSecret(redis, keys) for _ in range(8)]
    first, *others = await asyncio.gather(*(secret.get() for secret in secrets))
    assert len(first) == SECRET_BYTES
    assert all(other == first for other in others)


async def test_deployments_have_their_own(redis: Redis, keys: RedisKeys) -> None:
    elsewhere = RedisKeys(f"{keys.prefix}-elsewhere")
    assert await LinkSecret(redis, keys).get() != await LinkSecret(redis, elsewhere).get()
