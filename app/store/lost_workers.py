"""What happens to a worker's jobs when its end is seen, instead of concluded from its silence."""

from enum import StrEnum

from redis.asyncio import Redis

from app.store.client import Scripts, milliseconds
from app.store.keys import RedisKeys
from app.store.worker_registry import WorkerRegistry


class Fate(StrEnum):
    OWN = "own"  # it crashed or exited by itself: what it ran may be to blame
    OUTSIDE = "outside"  # somebody else ended it: what it ran is not to blame
    UNKNOWN = "unknown"


class LostWorkers:
    """Every method raises `StoreUnavailableError` when Redis does not answer."""

    def __init__(self, redis: Redis, keys: RedisKeys) -> None:
        self._registry = WorkerRegistry(redis, keys)
        self._scripts = Scripts(redis, keys.prefix)

    async def report(self, worker_id: str, fate: Fate, *, lease_s: float) -> int:
        """Records how a process ended that will never write again.

        Its jobs are free at once, without waiting for their leases, and are blamed as its end
        suggests; earlier blame is revised.

        Returns:
            How many jobs it held.
        """
        num_held: int = await self._scripts.run(
            "report_end", worker_id, fate.value, milliseconds(lease_s)
        )
        await self._registry.withdraw(worker_id)
        return num_held
