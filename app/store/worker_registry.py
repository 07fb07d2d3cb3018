"""Which workers are alive and what they serve: one model card per worker, kept by a heartbeat."""

from typing import Any

from redis.asyncio import Redis

from app.messages import ModelCard
from app.store.client import milliseconds, store_call
from app.store.keys import RedisKeys


class WorkerRegistry:
    """Every method raises `StoreUnavailableError` when Redis does not answer."""

    def __init__(self, redis: Redis, keys: RedisKeys) -> None:
        self._redis = redis
        self._keys = keys

    async def publish(self, card: ModelCard, ttl_s: float) -> None:
        """Announces that a worker is alive and takes jobs, for `ttl_s`."""
        async with store_call(), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.set(
                self._keys.worker(card.worker_id),
                card.model_dump_json(),
                px=milliseconds(ttl_s),
            )
            pipeline.sadd(self._keys.workers, card.worker_id)
            await pipeline.execute()

    async def withdraw(self, worker_id: str) -> None:
        """Announces at once that a worker takes no more jobs."""
        async with store_call(), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.delete(self._keys.worker(worker_id))
            pipeline.srem(self._keys.workers, worker_id)
            await pipeline.execute()

    async def cards(self) -> list[ModelCard]:
        """The cards of the workers that are alive, by worker id."""
        async with store_call():
            members: Any = await self._redis.smembers(self._keys.workers)
            worker_ids = sorted(member.decode() for member in members)
            if not worker_ids:
                return []
            cards: Any = await self._redis.mget([self._keys.worker(i) for i in worker_ids])
            gone = [i for i, card in zip(worker_ids, cards, strict=True) if card is None]
            if gone:
                await self._redis.srem(self._keys.workers, *gone)
        return [ModelCard.model_validate_json(card) for card in cards if card is not None]
