"""Which workers there are, by their cards."""

from redis.asyncio import Redis

from app.store.keys import RedisKeys
from app.store.worker_registry import WorkerRegistry
from tests.cards import model_card
from tests.integration.workers import wait_until


async def test_cards_are_of_those_who_are_alive_in_the_order_of_their_names(
    redis: Redis, keys: RedisKeys
) -> None:
    registry = WorkerRegistry(redis, keys)
    assert await registry.cards() == []
    for name in ("b", "a"):
        await registry.publish(model_card(name), ttl_s=60)
    await registry.publish(model_card("a").model_copy(update={"running_jobs": 1}), ttl_s=60)
    assert [(c.worker_id, c.running_jobs) for c in await registry.cards()] == [("a", 1), ("b", 0)]
    await registry.withdraw("a")
    assert await registry.cards() == [model_card("b")]


async def test_who_falls_silent_is_dropped(redis: Redis, keys: RedisKeys) -> None:
    registry = WorkerRegistry(redis, keys)
    await registry.publish(model_card("silent"), ttl_s=0.01)

    async def is_dropped() -> bool:
        return await registry.cards() == []

    await wait_until(is_dropped)
    assert await redis.scard(keys.workers) == 0
