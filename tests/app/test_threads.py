"""Blocking work in threads, whose caller may be cancelled at any time."""

import asyncio
import threading

import pytest

from app.threads import in_thread, outlast


class Work:
    """Returns or raises once it may."""

    def __init__(self, outcome: object) -> None:
        self.has_begun = threading.Event()
        self.may_end = threading.Event()
        self.has_ended = False
        self._outcome = outcome

    def __call__(self) -> object:
        self.has_begun.set()
        assert self.may_end.wait(60)
        self.has_ended = True
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


async def begun(work: Work, undone: list[object]) -> asyncio.Task[object]:
    task = asyncio.create_task(in_thread(work, undo=undone.append))
    await asyncio.to_thread(work.has_begun.wait, 60)
    return task


async def test_a_result_is_the_callers_and_is_not_undone() -> None:
    undone: list[object] = []
    assert await in_thread(lambda: 7, undo=undone.append) == 7
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0, undo=undone.append)
    assert undone == []


async def test_work_ends_before_its_cancelled_caller_does_and_is_undone() -> None:
    work, undone = Work("a descriptor"), []
    task = await begun(work, undone)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done(), "what the thread uses must not be closed under it"
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.has_ended and undone == ["a descriptor"]


async def test_a_second_cancellation_does_not_end_the_wait() -> None:
    work, undone = Work(1), []
    task = await begun(work, undone)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert undone == [1]


async def test_work_that_failed_leaves_nothing_to_undo() -> None:
    work, undone = Work(OSError("no")), []
    task = await begun(work, undone)
    task.cancel()
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert undone == []


async def test_who_outlasts_a_future_hears_of_its_cancellation_at_the_end() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(outlast(future))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    future.set_result(None)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_future_that_fails_is_outlasted_without_its_error() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_exception(OSError("no"))
    await outlast(future)
    assert isinstance(future.exception(), OSError)
