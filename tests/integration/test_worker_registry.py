"""Who works, by their cards."""

from redis.asyncio import Redis

from app.messages import ModelCard
from app.store.keys import RedisKeys
from app.store.worker_registry import WorkerRegistry
from tests.integration.workers import wait_until


def card(worker_id: str) -> ModelCard:
    return ModelCard(
        worker_id=worker_id,
        model="m",
        weights_digest="d",
        device="cpu",
        dtype="float32",
        image_size=8,
        tokens_per_frame=4,
        num_layers=1,
        max_model_tokens=100,
        prefill_chunk_tokens=8,
        max_running_jobs=1,
        running_jobs=0,
    )


async def test_cards_are_of_those_who_are_alive_in_the_order_of_their_names(
    redis: Redis, keys: RedisKeys
) -> None:
    registry = WorkerRegistry(redis, keys)
    assert await registry.cards() == []
    for name in ("b", "a"):
        await registry.publish(card(name), ttl_s=60)
    await registry.publish(card("a").model_copy(update={"running_jobs": 1}), ttl_s=60)
    assert [(c.worker_id, c.running_jobs) for c in await registry.cards()] == [("a", 1), ("b", 0)]
    await registry.withdraw("a")
    assert await registry.cards() == [card("b")]


async def test_who_falls_silent_is_dropped(redis: Redis, keys: RedisKeys) -> None:
    registry = WorkerRegistry(redis, keys)
    await registry.publish(card("silent"), ttl_s=0.01)

    async def is_dropped() -> bool:
        return await registry.cards() == []

    await wait_until(is_dropped)
    assert await redis.scard(keys.workers) == 0
