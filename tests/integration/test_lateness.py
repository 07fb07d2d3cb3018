"""Deadlines that cannot be met, judged by the pace of earlier jobs, are refused; a real Redis."""

from typing import Any

import pytest

from app.errors import DeadlineUnreachableError
from app.store.job_leases import JobLeases
from app.store.job_queue import JobQueue
from app.store.owner_limits import Allowance
from dycoke_core.config import Priority
from tests.integration.jobs import LEASE_S, MODEL, make_request, take, with_frames
from tests.integration.lua_clock import LuaClock

pytestmark = pytest.mark.usefixtures("clock")


class Asker:
    """Queues jobs, some of which have a deadline."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._number = 0

    async def ask(
        self, deadline_s: float | None = None, *, owner: str = "a", priority: Priority = "normal"
    ) -> None:
        self._number += 1
        request = make_request(f"job{self._number}", timeout_s=deadline_s or 600.0).model_copy(
            update={"owner": owner, "priority": priority, "deadline_s": deadline_s}
        )
        await self._queue.reserve(MODEL, request.job_id, max_jobs=1000, lease_s=30)
        try:
            await self._queue.create(request, allowance=Allowance(owner, max_tokens=9))
        except DeadlineUnreachableError:
            await self._queue.release(MODEL, request.job_id)
            raise
        assert await self._queue.enqueue(with_frames(request))

    async def fill(self, number: int) -> None:
        for _ in range(number):
            await self.ask()

    async def is_refused(self, deadline_s: float, **of_whom: Any) -> bool:
        try:
            await self.ask(deadline_s, **of_whom)
        except DeadlineUnreachableError:
            return True
        return False


async def leave(leases: JobLeases, clock: LuaClock, number: int, *, every_s: float) -> None:
    for _ in range(number):
        await clock.advance(every_s)
        await take(leases)


async def test_a_deadline_that_even_twice_the_pace_would_miss_is_refused(
    queue: JobQueue, leases: JobLeases, clock: LuaClock
) -> None:
    asker = Asker(queue)
    await asker.fill(20)
    await leave(leases, clock, 8, every_s=40.0)
    # 12 wait: 480 s at this pace, 240 s at twice that.
    with pytest.raises(DeadlineUnreachableError) as refused:
        await asker.ask(200.0)
    assert 40 <= refused.value.retry_after_s <= 60
    assert (refused.value.code, refused.value.retryable) == ("deadline_unreachable", True)
    assert not await asker.is_refused(300.0)
    assert (await queue.depth(MODEL)).waiting == 13, "what is refused leaves nothing"


async def test_nobody_is_refused_by_a_pace_of_few_jobs_or_of_times_with_little_to_do(
    queue: JobQueue, leases: JobLeases, clock: LuaClock
) -> None:
    asker = Asker(queue)
    for _ in range(10):  # one at a time: how long it took says who asked, not who works
        await asker.ask()
        await leave(leases, clock, 1, every_s=600.0)
    await asker.fill(20)
    assert not await asker.is_refused(300.0)
    await leave(leases, clock, 7, every_s=600.0)
    assert not await asker.is_refused(300.0)
    await leave(leases, clock, 1, every_s=600.0)
    assert await asker.is_refused(300.0)


async def test_an_outage_says_nothing_of_the_pace(
    queue: JobQueue, leases: JobLeases, clock: LuaClock
) -> None:
    asker = Asker(queue)
    await asker.fill(40)
    await leave(leases, clock, 4, every_s=10.0)
    await leave(leases, clock, 1, every_s=3000.0)
    await leave(leases, clock, 5, every_s=10.0)  # 30 are left, for 150 s at twice the pace
    assert not await asker.is_refused(200.0)
    assert await asker.is_refused(100.0)


async def test_what_counts_is_who_would_go_first(
    queue: JobQueue, leases: JobLeases, clock: LuaClock
) -> None:
    asker = Asker(queue)
    await asker.fill(30)
    await leave(leases, clock, 9, every_s=40.0)  # 21 are left, for 420 s at twice the pace
    assert await asker.is_refused(300.0, priority="low")
    assert await asker.is_refused(300.0)
    assert not await asker.is_refused(300.0, owner="b"), "a share of its own"
    assert not await asker.is_refused(300.0, priority="high")
    assert await asker.is_refused(300.0)


async def test_a_job_that_was_handed_back_keeps_the_pace(
    queue: JobQueue, leases: JobLeases, clock: LuaClock
) -> None:
    asker = Asker(queue)
    await asker.fill(20)
    await leave(leases, clock, 7, every_s=40.0)
    await clock.advance(40.0)
    assert await leases.hand_back(await take(leases), lease_s=LEASE_S)
    assert await asker.is_refused(200.0)


async def test_a_deadline_that_has_passed_before_the_job_is_made_is_refused(
    queue: JobQueue, leases: JobLeases
) -> None:
    assert await Asker(queue).is_refused(1e-9)
