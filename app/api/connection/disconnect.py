"""Notices that a client has closed its connection while we work for it.

An ASGI server reports it as `http.disconnect` from `receive`, once the request's body is read.
Writing does not reveal it: uvicorn drops what is sent to a client that has gone (ASGI 2.3); servers
of ASGI 2.4 raise OSError.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class ClientLeftError(Exception):
    """There is no one left to answer."""


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`, but cancels it as soon as the client is gone.

    What `work` returns is never lost: if it finishes in spite of being cancelled, that counts.

    Raises:
        ClientLeftError
    """
    limit = asyncio.timeout(None)
    loop = asyncio.get_running_loop()

    is_over = False

    def leave(_: object) -> None:
        if not is_over:  # both may end in one round of the loop
            limit.reschedule(loop.time())

    watcher = loop.create_task(_wait_for_disconnect(receive))
    watcher.add_done_callback(leave)
    try:
        async with limit:
            return await work
    except TimeoutError:
        if limit.expired():
            raise ClientLeftError from None
        raise
    finally:
        is_over = True
        watcher.remove_done_callback(leave)
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
