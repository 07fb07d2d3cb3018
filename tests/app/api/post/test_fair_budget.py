"""A budget that owners share in turn."""

import asyncio

import pytest

from app.api.post.fair_budget import FairBudget

A, B, C = "a", "b", "c"


async def waiting(budget: FairBudget, num_units: int, owner: str = A) -> asyncio.Task[None]:
    task = asyncio.create_task(budget.take(num_units, owner))
    await asyncio.sleep(0)
    return task


async def test_who_does_not_fit_waits_in_order() -> None:
    budget = FairBudget(10)
    await budget.take(6, A)
    second, third = await waiting(budget, 6), await waiting(budget, 1)
    assert not second.done() and not third.done()
    budget.give_back(6, A)
    await asyncio.gather(second, third)
    assert budget.used == 7


async def test_more_than_the_budget_comes_alone() -> None:
    budget = FairBudget(10)
    await budget.take(99, A)
    second = await waiting(budget, 1)
    assert not second.done()
    budget.give_back(99, A)
    await second
    assert budget.used == 1


async def test_one_that_is_cancelled_as_room_comes_holds_nothing() -> None:
    budget = FairBudget(10)
    await budget.take(10, A)
    cancelled, next_one = await waiting(budget, 10), await waiting(budget, 10)
    cancelled.cancel()
    budget.give_back(10, A)  # before the task has heard of its cancellation
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    await next_one
    assert budget.used == 10
    budget.give_back(10, A)
    assert budget.used == 0


async def test_one_that_is_cancelled_leaves_its_owners_others_their_turn() -> None:
    budget = FairBudget(1)
    await budget.take(1, A)
    cancelled, second = await waiting(budget, 1, B), await waiting(budget, 1, B)
    third = await waiting(budget, 1, C)
    cancelled.cancel()
    budget.give_back(1, A)
    await second
    assert not third.done()
    budget.give_back(1, B)
    await third
    assert cancelled.cancelled()


async def test_owners_take_turns_however_many_wait_of_each() -> None:
    budget = FairBudget(1)
    await budget.take(1, A)
    order: list[str] = []

    async def visit(owner: str) -> None:
        async with budget.taken(1, owner):
            order.append(owner)

    owners = [*8 * [A], *2 * [B], C]
    visits = [asyncio.create_task(visit(owner)) for owner in owners]
    await asyncio.sleep(0)
    budget.give_back(1, A)
    await asyncio.gather(*visits)
    assert order == [B, C, A, B, *7 * [A]], "the first turn was A's"
    assert budget.used == 0


async def test_one_owner_has_at_most_its_share() -> None:
    budget = FairBudget(4, max_of_one=2)
    first, second, third = [await waiting(budget, 1, A) for _ in range(3)]
    assert first.done() and second.done() and not third.done()
    for _ in range(2):
        await budget.take(1, B)
    assert not third.done()
    budget.give_back(1, B)
    assert not third.done(), "the room is another's"
    budget.give_back(1, A)
    await third
    assert budget.used == 3
