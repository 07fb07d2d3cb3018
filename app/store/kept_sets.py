"""The visual tokens that jobs kept, token by token: a `KeptHistory` for each job that asked for it.

It is written once, by the worker that ends the job, just before the end. It counts among the bytes
of ended jobs and is deleted with the job's record. If the job never ends, it is deleted after a
day.
"""

from logging import getLogger
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from app.store.client import Scripts, store_call
from app.store.job_leases import Delivery
from app.store.keys import RedisKeys

logger = getLogger(__name__)


class KeptSets:
    """Every method raises `StoreUnavailableError` when Redis does not answer."""

    def __init__(self, redis: Redis, keys: RedisKeys) -> None:
        self._redis = redis
        self._keys = keys
        # Not among frames, for which a worker may wait: until one job's sets are stored it
        # publishes nothing. They are small enough, and one at a time.
        self._scripts = Scripts(redis, keys.prefix)

    async def put(self, delivery: Delivery, blob: bytes) -> bool:
        """Stores what a running job kept, in place of what an earlier attempt left.

        Returns:
            False, and nothing is stored, if the job is no longer this delivery's worker's.
        """
        try:
            reply = await self._scripts.run(
                "keep", delivery.job_id, delivery.worker_id, delivery.attempt, blob
            )
        except ResponseError:  # an error of this job alone
            logger.exception("kept sets could not be stored", extra=delivery.request.log_fields)
            return False
        return bool(reply)

    async def get(self, job_id: str) -> bytes | None:
        """Returns None if nothing is stored."""
        async with store_call():
            blob: Any = await self._redis.get(self._keys.kept(job_id))
        return None if blob is None else bytes(blob)
