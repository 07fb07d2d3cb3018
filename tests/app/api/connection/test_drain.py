"""Two steps of shutting down."""

import asyncio

import pytest

from app.api.connection.drain import Drain
from app.errors import ShuttingDownError


async def test_begin_refuses_what_is_new_and_leaves_what_is_open() -> None:
    drain = Drain()
    drain.check()
    async with drain.until_expired():
        drain.begin()
        await asyncio.sleep(0)
    with pytest.raises(ShuttingDownError):
        drain.check()


async def test_expiry_ends_what_is_open_and_what_comes_after() -> None:
    drain = Drain()
    asyncio.get_running_loop().call_later(0.01, drain.expire)
    for _ in range(2):
        with pytest.raises(ShuttingDownError):
            async with drain.until_expired():
                await asyncio.Event().wait()
    drain.expire()


async def test_time_limits_inside_keep_their_meaning() -> None:
    with pytest.raises(TimeoutError):
        async with Drain().until_expired(), asyncio.timeout(0.01):
            await asyncio.Event().wait()
