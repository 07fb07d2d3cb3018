"""The connection: cancellation, outages, errors in our words."""

import asyncio

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from app.errors import StoreUnavailableError
from app.store.client import Scripts, connect, store_call
from app.store.keys import RedisKeys
from tests.integration.conftest import RedisServer


async def test_cancelling_a_call_is_never_swallowed(redis: Redis, keys: RedisKeys) -> None:
    """At whichever turn of the event loop the cancellation comes."""
    scripts = Scripts(redis, keys.prefix)
    for turns in range(12):
        await scripts.run("depth", "m")
        call = asyncio.create_task(scripts.run("depth", "m"))
        for _ in range(turns):
            await asyncio.sleep(0)
        if call.done():
            break
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_client_outlives_a_restart_of_redis(own_redis_server: RedisServer) -> None:
    redis = connect(own_redis_server.url)
    scripts = Scripts(redis, "p")
    await scripts.run("depth", "m")
    own_redis_server.stop()
    with pytest.raises(StoreUnavailableError):
        await scripts.run("depth", "m")
    own_redis_server.start()
    assert await scripts.run("depth", "m") == [0, 0, 0, -1]
    await redis.aclose()


async def test_scripts_that_redis_has_forgotten_are_loaded_again(
    redis: Redis, keys: RedisKeys
) -> None:
    scripts = Scripts(redis, keys.prefix)
    await redis.script_flush()
    assert await scripts.run("depth", "m") == [0, 0, 0, -1]


async def test_full_or_read_only_redis_is_unavailable(own_redis_server: RedisServer) -> None:
    redis = connect(own_redis_server.url)
    scripts = Scripts(redis, "p")
    await redis.config_set("maxmemory", 1)
    with pytest.raises(StoreUnavailableError):
        await scripts.run("reserve", "m", "j", 1, 1000)
    with pytest.raises(StoreUnavailableError):
        async with store_call():
            await redis.set("a", "b")
    await redis.config_set("maxmemory", 0)
    await redis.replicaof("127.0.0.1", "1")
    with pytest.raises(StoreUnavailableError):
        await scripts.run("reserve", "m", "j", 1, 1000)
    await redis.aclose()


async def test_redis_that_does_not_answer_in_time_is_unavailable(
    own_redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = connect(own_redis_server.url)
    await redis.ping()
    monkeypatch.setattr("app.store.client.CALL_TIMEOUT_S", 0.1)
    await redis.client_pause(500)
    with pytest.raises(StoreUnavailableError):
        async with store_call():
            await redis.set("a", "b")
    await redis.aclose()


async def test_mistakes_of_ours_are_not_called_an_outage(redis: Redis) -> None:
    with pytest.raises(ResponseError):
        async with store_call():
            await redis.execute_command("NO SUCH COMMAND")


@pytest.mark.parametrize("url", ["", "localhost", "http://localhost", "redis://h:port"])
def test_what_is_no_redis_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        connect(url)
