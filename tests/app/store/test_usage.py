"""What each owner used, by day."""

from redis.asyncio import Redis

from app.messages import JobState
from app.store.job_queue import JobQueue
from app.store.keys import RedisKeys
from app.store.usage import DAY_S, USAGE_DAYS, UsageLog, today
from tests.integration.jobs import cancelled, submit


async def test_uploads_and_jobs_are_counted_on_their_day(
    redis: Redis, keys: RedisKeys, queue: JobQueue
) -> None:
    usage = UsageLog(redis, keys)
    first_day = today()
    await usage.count_upload("anonymous", 100)
    await usage.count_upload("anonymous", 50)
    await submit(queue, "j")
    assert await queue.end("j", JobState.CANCELLED, cancelled("j"))
    days = range(first_day, today() + 1)  # midnight may pass meanwhile
    counted = await usage.read("anonymous", days)
    total = {name: sum(day.get(name, 0) for day in counted) for day in counted for name in day}
    assert total == {"uploads": 2, "upload_bytes": 150, "jobs": 1, "jobs_cancelled": 1}
    assert await usage.read("somebody else", days) == [{} for _ in days]
    ttls = [await redis.ttl(keys.usage(f"anonymous:{day}")) for day in days]
    assert 0 < max(ttls) <= USAGE_DAYS * DAY_S
