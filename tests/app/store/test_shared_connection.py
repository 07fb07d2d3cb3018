"""The connection that a process's short calls share: order, losses, silence, cancellation."""

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from app.store.client import connect, shared_connection
from app.store.keys import RedisKeys
from app.store.shared_connection import SharedConnection
from tests.garbage import collection_paused
from tests.integration.conftest import RedisServer

PATIENCE_S = 30.0


@pytest.fixture
async def shared(redis: Redis) -> SharedConnection:
    return shared_connection(redis)


@pytest.fixture
async def impatient(own_redis_server: RedisServer) -> AsyncIterator[SharedConnection]:
    """Gives a call up after half a second."""
    client = connect(own_redis_server.url)
    connection: AbstractConnection = client.connection_pool.make_connection()
    shared = SharedConnection(connection, timeout_s=0.5)
    yield shared
    await shared.aclose()
    await client.aclose()


async def client_id(shared: SharedConnection) -> int:
    number: int = await shared.call("CLIENT", "ID")
    return number


async def test_each_of_many_calls_gets_its_own_reply(shared: SharedConnection) -> None:
    replies = await asyncio.gather(*(shared.call("ECHO", n) for n in range(500)))
    assert replies == [str(n).encode() for n in range(500)]


async def test_calls_share_one_connection(shared: SharedConnection) -> None:
    assert len(set(await asyncio.gather(*(client_id(shared) for _ in range(20))))) == 1


async def test_nothing_that_was_sent_or_received_is_kept(shared: SharedConnection) -> None:
    """A clip's frames may be: the next call that takes their place may be long in coming."""
    sent = bytes(100_000)
    with collection_paused():
        received = await shared.call("ECHO", sent)
        await asyncio.sleep(0)  # what woke us has the reply too
        references = sys.getrefcount(sent), sys.getrefcount(received)
    assert sent == received
    assert references == (2, 2), "a name and an argument each"


async def test_error_in_a_reply_is_that_calls_alone(shared: SharedConnection) -> None:
    before, wrong, after = await asyncio.gather(
        *(shared.call("ECHO", 1), shared.call("NO", "SUCH"), shared.call("ECHO", 2)),
        return_exceptions=True,
    )
    assert (before, after) == (b"1", b"2")
    assert isinstance(wrong, ResponseError)


async def test_argument_that_cannot_be_sent_fails_its_call_alone(shared: SharedConnection) -> None:
    calls = [shared.call("ECHO", 1), shared.call("ECHO", "\ud800"), shared.call("ECHO", 2)]
    before, wrong, after = await asyncio.gather(*calls, return_exceptions=True)
    assert (before, after) == (b"1", b"2")
    assert isinstance(wrong, UnicodeEncodeError)


async def test_cancelled_call_takes_nobody_elses_reply(shared: SharedConnection) -> None:
    for turns in range(8):
        cancelled = asyncio.create_task(shared.call("ECHO", "cancelled"))
        others = [asyncio.create_task(shared.call("ECHO", n)) for n in range(3)]
        for _ in range(turns):
            await asyncio.sleep(0)
        cancelled.cancel()
        assert await asyncio.gather(*others) == [b"0", b"1", b"2"]
        await asyncio.gather(cancelled, return_exceptions=True)
    assert len({await client_id(shared), await client_id(shared)}) == 1


async def test_calls_under_way_when_the_connection_is_lost_are_sent_again(
    own_redis_server: RedisServer,
) -> None:
    redis = connect(own_redis_server.url)
    shared = shared_connection(redis)
    lost = await client_id(shared)
    await redis.execute_command("CLIENT PAUSE", 60_000, "WRITE")
    calls = [asyncio.create_task(shared.call("INCR", "n")) for _ in range(3)]
    async with asyncio.timeout(PATIENCE_S):
        while await _query_bytes(redis, lost) == 0:
            await asyncio.sleep(0.01)
    await redis.execute_command("CLIENT KILL", "ID", lost)
    await redis.execute_command("CLIENT UNPAUSE")
    assert await asyncio.gather(*calls) == [1, 2, 3]
    assert await client_id(shared) != lost
    await redis.aclose()


async def _query_bytes(redis: Redis, client: int) -> int:
    """Of commands that have arrived and wait."""
    for about in await redis.client_list():
        if int(about["id"]) == client:
            return int(about["qbuf"]) + (about["cmd"] == "incr")
    return 0


async def test_calls_that_wait_for_their_turn_are_sent_only_if_somebody_still_waits(
    redis: Redis, keys: RedisKeys
) -> None:
    connection: AbstractConnection = redis.connection_pool.make_connection()
    shared = SharedConnection(connection, timeout_s=PATIENCE_S, max_unanswered=2)
    client = await client_id(shared)
    queue, counter = keys.job("queue"), keys.job("counter")
    blocking = asyncio.create_task(shared.call("BLPOP", queue, 0))
    calls = [asyncio.create_task(shared.call("INCR", counter)) for _ in range(5)]
    async with asyncio.timeout(PATIENCE_S):
        while await _query_bytes(redis, client) == 0:
            await asyncio.sleep(0.01)
    for call in calls[:3]:  # of which one was sent
        call.cancel()
    await redis.rpush(queue, "x")
    await blocking
    assert (await asyncio.gather(*calls, return_exceptions=True))[3:] == [2, 3]
    await shared.aclose()


async def test_idle_connection_may_be_lost(redis: Redis, shared: SharedConnection) -> None:
    for _ in range(5):
        await redis.execute_command("CLIENT KILL", "ID", await client_id(shared))
        assert await shared.call("ECHO", 1) == b"1"


async def test_redis_that_is_away_is_a_connection_error(own_redis_server: RedisServer) -> None:
    redis = connect(own_redis_server.url)
    shared = shared_connection(redis)
    assert await shared.call("ECHO", 1) == b"1"
    own_redis_server.stop()
    outcomes = await asyncio.gather(
        *(shared.call("ECHO", n) for n in range(3)), return_exceptions=True
    )
    assert all(isinstance(outcome, ConnectionError) for outcome in outcomes)
    own_redis_server.start()
    assert await shared.call("ECHO", 2) == b"2"
    await redis.aclose()


async def test_silent_connection_is_given_up(
    own_redis_server: RedisServer, impatient: SharedConnection
) -> None:
    silent = await client_id(impatient)
    own_redis_server.pause()
    with pytest.raises(RedisTimeoutError):
        await impatient.call("ECHO", 1)
    own_redis_server.resume()
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                assert await client_id(impatient) != silent
                return
            except RedisTimeoutError:
                pass  # it takes the server a while to be back


async def test_silence_is_noticed_though_nobody_waits_any_longer(
    own_redis_server: RedisServer, impatient: SharedConnection
) -> None:
    """As where all callers have limits of their own, shorter than the connection's."""
    silent = await client_id(impatient)
    own_redis_server.pause()
    call = asyncio.create_task(impatient.call("ECHO", 1))
    await asyncio.sleep(0.1)
    call.cancel()
    await asyncio.sleep(0.6)
    own_redis_server.resume()
    assert await client_id(impatient) != silent


async def test_closing_ends_the_calls_that_are_under_way(own_redis_server: RedisServer) -> None:
    redis = connect(own_redis_server.url)
    shared = shared_connection(redis)
    await shared.call("ECHO", 1)
    own_redis_server.pause()
    call = asyncio.create_task(shared.call("ECHO", 2))
    await asyncio.sleep(0.05)
    await redis.aclose()
    with pytest.raises(ConnectionError):
        await call
    own_redis_server.resume()
