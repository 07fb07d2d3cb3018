"""Jobs of a real Redis, and what follows their events."""

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from app.api.answer.jobs import Jobs
from app.store.event_log import EventLog
from app.store.event_reader import EventReader
from app.store.job_queue import JobQueue
from app.store.keys import RedisKeys
from tests.app.store.test_event_reader import running_reader
from tests.integration.conftest import RedisServer


@pytest.fixture
async def reader(redis_server: RedisServer, keys: RedisKeys) -> AsyncIterator[EventReader]:
    async with running_reader(redis_server.url, keys) as reader:
        yield reader


@pytest.fixture
def jobs(queue: JobQueue, log: EventLog, reader: EventReader, redis: Redis) -> Jobs:
    return Jobs(queue, log, reader, heartbeat_s=60.0)
