"""Jobs that wait for their choice: their order, and what each choice knows of later ones."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from app.store.queue_snapshot import QueueSnapshot
from app.worker.choosing_line import ChoosingLine
from app.worker.running_jobs import RunningJob
from dycoke_core.precedence import MAX_OVERTAKES
from tests.app.worker.test_running_jobs import running_job


@pytest.fixture
def line() -> ChoosingLine:
    return ChoosingLine()


@contextmanager
def held(line: ChoosingLine, job: RunningJob) -> Iterator[None]:
    """A job as the worker holds it, from when it is taken until the engine has it."""
    line.note_taken(job)
    try:
        yield
    finally:
        line.note_left(job)


async def take_turn(line: ChoosingLine, job: RunningJob, order: list[tuple[str, int]]) -> None:
    with held(line, job):
        async with line.turn(job):
            order.append((job.job_id, len(line.outlook(job).waited_s)))
            await asyncio.sleep(0)


async def test_turns_come_in_order_and_each_sees_those_behind_it(line: ChoosingLine) -> None:
    order: list[tuple[str, int]] = []
    jobs = [running_job(name) for name in "abc"]
    async with line.turn(running_job("first")):
        assert not line.is_empty_for(jobs[0])
        assert line.is_empty_for(running_job("high", priority="high"))
        tasks = [asyncio.create_task(take_turn(line, job, order)) for job in jobs]
        await asyncio.sleep(0)
        assert len(line.outlook(running_job("next")).waited_s) == 3
        assert len(line.outlook(jobs[0]).waited_s) == 2, "it does not wait for itself"
    await asyncio.gather(*tasks)
    assert order == [("a", 2), ("b", 1), ("c", 0)]
    assert line.is_empty_for(jobs[0])


async def test_who_gives_up_is_waited_for_by_nobody(line: ChoosingLine) -> None:
    order: list[tuple[str, int]] = []
    async with line.turn(running_job("first")):
        tasks = [asyncio.create_task(take_turn(line, running_job(name), order)) for name in "ab"]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.sleep(0)
        assert len(line.outlook(running_job("next")).waited_s) == 1
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [("b", 0)] and line.is_empty_for(running_job("next"))


async def test_better_ones_go_on_beside_one_whose_turn_has_come_but_that_has_to_wait(
    line: ChoosingLine,
) -> None:
    order: list[tuple[str, int]] = []
    async with line.turn(running_job("first")):
        jobs = [running_job("low", priority="low")]
        jobs += [running_job(f"high {number}", priority="high") for number in range(6)]
        tasks = [asyncio.create_task(take_turn(line, job, order)) for job in jobs]
        await asyncio.wait(tasks[1:], timeout=30)
        assert len(order) == 6, "the low one waits for the first, and they do not"
        tasks += [asyncio.create_task(take_turn(line, running_job("normal"), order))]
        await settle()
    await asyncio.gather(*tasks)
    assert [name for name, _ in order[6:]] == ["low", "normal"], "it was its turn"


async def test_better_ones_are_called_while_one_whose_turn_has_come_has_it(
    line: ChoosingLine,
) -> None:
    order: list[tuple[str, int]] = []
    ends = asyncio.Event()

    async def take_long(job: RunningJob) -> None:
        async with line.turn(job):
            order.append((job.job_id, 0))
            await ends.wait()

    async with line.turn(running_job("first")):
        low = asyncio.create_task(take_long(running_job("low", priority="low")))
        normals = [running_job(f"normal {number}") for number in range(MAX_OVERTAKES + 2)]
        tasks = [asyncio.create_task(take_turn(line, job, order)) for job in normals]
        await settle()
        assert not order
    await asyncio.wait(tasks, timeout=30)
    assert not low.done() and len(order) == len(normals) + 1
    assert order[MAX_OVERTAKES][0] == "low"
    ends.set()
    await low


async def test_a_better_priority_goes_first_and_a_low_one_does_not_starve(
    line: ChoosingLine,
) -> None:
    order: list[tuple[str, int]] = []
    async with line.turn(running_job("first")):
        jobs = [running_job("low", priority="low")]
        jobs += [running_job(f"high {number}", priority="high") for number in range(8)]
        tasks = [asyncio.create_task(take_turn(line, job, order)) for job in jobs]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    names = [name for name, _ in order]
    assert names[0] == "high 0" and names.index("low") == MAX_OVERTAKES


async def test_who_is_dropped_as_its_turn_comes_passes_it_on(line: ChoosingLine) -> None:
    order: list[tuple[str, int]] = []
    async with line.turn(running_job("first")):
        tasks = [asyncio.create_task(take_turn(line, running_job(n), order)) for n in "ab"]
        await asyncio.sleep(0)
    tasks[0].cancel()  # its turn has come, and it has not run yet
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [("b", 0)] and line.is_empty_for(running_job("next"))


async def pass_by(
    line: ChoosingLine, job: RunningJob, keys: set[str], there: set[str], order: list[str]
) -> None:
    async def passes() -> bool:
        return bool(keys & there)

    with held(line, job):
        async with line.turn(job, frozenset(keys), passes):
            order.append(job.job_id)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_who_waits_leaves_the_line_when_its_prefix_comes(line: ChoosingLine) -> None:
    order: list[str] = []
    there: set[str] = set()
    keys = {"a": {"x"}, "b": {"y full", "y dycoke"}, "c": {"y full"}, "d": {"z"}}
    async with line.turn(running_job("first")):
        tasks = [
            asyncio.create_task(pass_by(line, running_job(name), keys[name], there, order))
            for name in keys
        ]
        await settle()
        line.note_prefix("y full")
        await settle()
        assert not order, "it had gone again when they were asked"
        there.add("y dycoke")
        line.note_prefix("y dycoke")
        await settle()
        assert order == ["b"]
        assert len(line.outlook(running_job("next")).waited_s) == 3
        there.add("y full")
        line.note_prefix("y full")
        await settle()
        assert order == ["b", "c"]
    await asyncio.gather(*tasks)
    assert order == ["b", "c", "a", "d"], "the others keep their order"
    assert line.is_empty_for(running_job("next"))


async def test_a_turn_that_comes_while_its_job_passes_by_goes_to_the_next(
    line: ChoosingLine,
) -> None:
    order: list[str] = []
    asked, answer = asyncio.Event(), asyncio.Event()

    async def passes() -> bool:
        asked.set()
        return await answer.wait()

    async def take_slowly(job: RunningJob) -> None:
        async with line.turn(job, frozenset({"x"}), passes):
            order.append(job.job_id)
            await stays.wait()

    stays = asyncio.Event()
    async with line.turn(running_job("first")):
        slow = asyncio.create_task(take_slowly(running_job("slow")))
        next_one = asyncio.create_task(pass_by(line, running_job("next"), set(), set(), order))
        await settle()
        line.note_prefix("x")
        await asked.wait()
    answer.set()
    await next_one
    assert order == ["slow", "next"], "the slow one holds no turn"
    stays.set()
    await slow


async def test_jobs_that_are_being_prepared_or_have_a_turn_are_counted(line: ChoosingLine) -> None:
    first, second = running_job("first"), running_job("second")
    high = running_job("high", priority="high")
    with held(line, first):
        with held(line, second), held(line, high):
            async with line.turn(first):
                assert len(line.outlook(first).waited_s) == 2, "none has come to the line yet"
                async with line.turn(high):
                    assert len(line.outlook(first).waited_s) == 2, "one has a turn beside it"
        assert len(line.outlook(first).waited_s) == 0


async def test_what_waits_in_the_queue_comes_after_what_waits_here(line: ChoosingLine) -> None:
    line.note(QueueSnapshot.read(b"10000 2 9 2000 2000 7000 8000 9000 9500"))
    async with line.turn(running_job("first")):
        task = asyncio.create_task(
            take_turn(line, running_job("a", queued_at_s=time.time() - 60), [])
        )
        await asyncio.sleep(0)
        outlook = line.outlook(running_job("first"))
    await task
    here, longer, shorter = outlook.waited_s
    assert here > 59
    assert longer - shorter == pytest.approx(1.5), "every second one is the other worker's"
    assert 0 < outlook.arrivals_per_s <= 8 / 8 / 2


async def test_a_backlog_of_low_priority_presses_on_no_better_job(line: ChoosingLine) -> None:
    """They give way: however late they are, a better job needs no more compression for them."""
    line.note(QueueSnapshot.read(b"10000 1 9 2000 2000 1000:low 2000:low 9000"))
    low, normal = running_job("low", priority="low"), running_job("normal")
    with held(line, low), held(line, normal):
        assert len(line.outlook(running_job("high", priority="high")).waited_s) == 0
        assert len(line.outlook(normal).waited_s) == 1
        assert len(line.outlook(low).waited_s) == 4


def take_and_leave(
    line: ChoosingLine, queued_ms: int, started_ms: int, queue: QueueSnapshot | None = None
) -> None:
    job = running_job("taken", queued_at_s=queued_ms / 1000)
    job.delivery = replace(job.delivery, started_at_s=started_ms / 1000, queue=queue)
    with held(line, job):
        pass


def num_waiting(line: ChoosingLine) -> int:
    return len(line.outlook(running_job("next")).waited_s)


def test_a_job_that_was_taken_waits_in_redis_no_more(line: ChoosingLine) -> None:
    line.note(QueueSnapshot.read(b"10000 1 9 2000 2000 7000 8000 9000"))
    assert num_waiting(line) == 3
    take_and_leave(line, 7000, 10_100)  # of a policy that is fixed: it brings no news
    assert num_waiting(line) == 2
    line.note(QueueSnapshot.read(b"10050 1 9 2000 2000 7000 8000 9000 10040"))
    assert num_waiting(line) == 3, "that reply is of before it was taken"
    newest = QueueSnapshot.read(b"10300 1 9 2000 2000 9000")
    take_and_leave(line, 8000, 10_300, newest)
    line.note(QueueSnapshot.read(b"10200 1 9 2000 2000 8000 9000"))
    assert num_waiting(line) == 1, "a reply that is overtaken says nothing new"
    line.note(QueueSnapshot.read(b"10400 1 9 2000 2000 7000 9000"))
    assert num_waiting(line) == 2, "another one that was queued in the same millisecond"


def test_a_clock_that_was_set_back_is_believed(line: ChoosingLine) -> None:
    line.note(QueueSnapshot.read(b"100000 1 9 2000 2000 7000 8000"))
    line.note(QueueSnapshot.read(b"50000 1 9 2000 2000 49000"))
    assert num_waiting(line) == 1


async def test_a_job_of_a_lost_worker_has_not_waited_since_it_was_queued(
    line: ChoosingLine,
) -> None:
    now_s = time.time()
    job = running_job("again", queued_at_s=now_s - 3600)
    job.delivery = replace(job.delivery, attempt=2, started_at_s=now_s)
    async with line.turn(running_job("first")):
        task = asyncio.create_task(take_turn(line, job, []))
        await asyncio.sleep(0)
        (waited_s,) = line.outlook(running_job("first")).waited_s
        assert waited_s < 1800
    await task
