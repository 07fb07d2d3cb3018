"""Blocking work in a thread, for an event loop that may cancel the task waiting for it."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(work: Callable[[], T], undo: Callable[[T], None] | None = None) -> T:
    """Runs `work` in a thread, to its end even if the caller is cancelled: a thread cannot be
    stopped, and what it uses (a descriptor!) must not be closed under it. Then `undo` takes back a
    result that was not received.
    """
    done = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        with suppress(asyncio.CancelledError):
            await outlast(done)
        if done.exception() is None and undo is not None:
            undo(done.result())
        raise


async def outlast(future: asyncio.Future[Any]) -> None:
    """Waits for a future's end, also if the caller is cancelled, who hears of it then."""
    is_cancelled = False
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            is_cancelled = True
    if is_cancelled:
        raise asyncio.CancelledError
