"""The settings of workers with short leases, and a client of theirs."""

from collections.abc import AsyncIterator

import pytest

from app.settings import Settings
from app.store.keys import RedisKeys
from tests.integration.conftest import RedisServer
from tests.integration.workers import Client, client_of

LEASE_S = 0.6


@pytest.fixture
def settings(redis_server: RedisServer, keys: RedisKeys) -> Settings:
    return Settings(
        redis_url=redis_server.url, redis_prefix=keys.prefix, lease_s=LEASE_S, drain_timeout_s=20
    )


@pytest.fixture
def hasty(settings: Settings) -> Settings:
    """Of workers that hand their jobs back when they stop, instead of ending them first."""
    return settings.model_copy(update={"drain_timeout_s": 0.1})


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[Client]:
    async with client_of(settings) as client:
        yield client
