"""Bytes of frames between a reader and Redis."""

import asyncio

import pytest

from app.api.post.frames_in_hand import FramesInHand


async def waiting(in_hand: FramesInHand, num_bytes: int) -> asyncio.Task[None]:
    task = asyncio.create_task(in_hand.take(num_bytes))
    await asyncio.sleep(0)
    return task


async def test_who_does_not_fit_waits_in_order() -> None:
    in_hand = FramesInHand(10)
    await in_hand.take(6)
    second, third = await waiting(in_hand, 6), await waiting(in_hand, 1)
    assert not second.done() and not third.done()
    in_hand.give_back(6)
    await asyncio.gather(second, third)
    assert in_hand.used_bytes == 7


async def test_more_than_the_budget_comes_alone() -> None:
    in_hand = FramesInHand(10)
    await in_hand.take(99)
    second = await waiting(in_hand, 1)
    assert not second.done()
    in_hand.give_back(99)
    await second
    assert in_hand.used_bytes == 1


async def test_one_that_is_cancelled_as_room_comes_holds_nothing() -> None:
    in_hand = FramesInHand(10)
    await in_hand.take(10)
    cancelled, next_one = await waiting(in_hand, 10), await waiting(in_hand, 10)
    cancelled.cancel()
    in_hand.give_back(10)  # before the task has heard of its cancellation
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    await next_one
    assert in_hand.used_bytes == 10
    in_hand.give_back(10)
    assert in_hand.used_bytes == 0
