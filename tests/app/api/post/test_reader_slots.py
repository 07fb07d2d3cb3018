"""Slots for frame readers: shared by processes, each played by a `ReaderSlots` of its own."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from app import process_table as module
from app.api.post.reader_slots import POLL_S, ReaderSlots
from app.process_table import ProcessRow, ProcessTable, Wait

PATIENCE_S = 20.0
NUM_SLOTS = 2
OWNER, OTHER = "owner", "other"


@pytest.fixture
def rows(
    process_table: ProcessTable, monkeypatch: pytest.MonkeyPatch
) -> tuple[ProcessRow, ProcessRow]:
    """Of two processes that stay alive, however slow the machine."""
    monkeypatch.setattr(module, "HEARTBEAT_TIMEOUT_S", 3600.0)
    rows = process_table.take_row(0), process_table.take_row(1)
    for row in rows:
        row.beat()
    return rows


@pytest.fixture
def both(rows: tuple[ProcessRow, ProcessRow]) -> tuple[ReaderSlots, ReaderSlots]:
    here, there = rows
    return ReaderSlots(here, NUM_SLOTS), ReaderSlots(there, NUM_SLOTS)


class Visit:
    """A reader that stays in its slot until it is released."""

    def __init__(self, slot: AbstractAsyncContextManager[object]) -> None:
        self.is_in = asyncio.Event()
        self._may_go = asyncio.Event()
        self.task = asyncio.create_task(self._run(slot))

    async def _run(self, slot: AbstractAsyncContextManager[object]) -> None:
        async with slot:
            self.is_in.set()
            await self._may_go.wait()

    async def wait_until_in(self) -> "Visit":
        async with asyncio.timeout(PATIENCE_S):
            await self.is_in.wait()
        return self

    async def leave(self) -> None:
        self._may_go.set()
        await self.task


@asynccontextmanager
async def visiting(*slots: AbstractAsyncContextManager[object]) -> AsyncIterator[list[Visit]]:
    visits = [Visit(slot) for slot in slots]
    yield visits
    for visit in visits:
        visit.task.cancel()
    await asyncio.gather(*(visit.task for visit in visits), return_exceptions=True)


async def look_twice() -> None:
    await asyncio.sleep(3 * POLL_S)


@pytest.mark.parametrize("kind", ["to_read", "to_probe"])
async def test_processes_share_the_places_of_each_kind(
    both: tuple[ReaderSlots, ReaderSlots], kind: str
) -> None:
    here: Callable[[str], AbstractAsyncContextManager[None]] = getattr(both[0], kind)
    there: Callable[[str], AbstractAsyncContextManager[None]] = getattr(both[1], kind)
    async with visiting(here(OWNER), there(OWNER)) as (first, second):
        await first.wait_until_in()
        await second.wait_until_in()
        async with visiting(here(OWNER), there(OWNER)) as waiting:
            await look_twice()
            assert not any(visit.is_in.is_set() for visit in waiting)
            await first.leave()
            await second.leave()
            for visit in waiting:
                await visit.wait_until_in()


async def test_probes_and_reads_have_places_of_their_own(
    both: tuple[ReaderSlots, ReaderSlots],
) -> None:
    reads = [slots.to_read(OWNER) for slots in both]
    probes = [slots.to_probe(OWNER) for slots in both]
    async with visiting(*reads, *probes) as visits:
        for visit in visits:
            await visit.wait_until_in()


@pytest.mark.parametrize("kind", ["to_read", "to_probe"])
async def test_owners_wait_for_one_of_anothers_and_not_for_all(
    process_table: ProcessTable, kind: str
) -> None:
    enter: Callable[[str], AbstractAsyncContextManager[None]] = getattr(
        ReaderSlots(process_table.take_row(0), 1), kind
    )
    async with visiting(*(enter(OWNER) for _ in range(4)), enter(OTHER)) as visits:
        first, second, third, _, other = visits
        await (await first.wait_until_in()).leave()
        await (await second.wait_until_in()).leave()
        await other.wait_until_in()
        assert not third.is_in.is_set()


@pytest.mark.parametrize("kind", ["to_read", "to_probe"])
async def test_another_processs_backlog_goes_first_once_and_not_with_all(
    both: tuple[ReaderSlots, ReaderSlots], kind: str
) -> None:
    here: Callable[[str], AbstractAsyncContextManager[None]] = getattr(both[0], kind)
    there: Callable[[str], AbstractAsyncContextManager[None]] = getattr(both[1], kind)
    async with visiting(*(here(OWNER) for _ in range(8))) as backlog:
        await backlog[1].wait_until_in()
        async with visiting(there(OTHER)) as (other,):
            await look_twice()
            await backlog[0].leave()
            await backlog[2].wait_until_in()
            await look_twice()
            assert not other.is_in.is_set(), "the first process has waited longer"
            await backlog[1].leave()
            await other.wait_until_in()
            await look_twice()
            assert not backlog[3].is_in.is_set()
            await other.leave()
            await backlog[3].wait_until_in()


async def test_who_comes_behind_two_backlogs_waits_for_one_of_each_before_every_turn(
    rows: tuple[ProcessRow, ProcessRow],
) -> None:
    here, there = (ReaderSlots(row, 1) for row in rows)
    order: list[str] = []

    async def visit(name: str, slot: AbstractAsyncContextManager[None]) -> None:
        async with slot:
            order.append(name)
            await look_twice()

    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as visits, here.to_read(OWNER):
        for slots, name in ((here, "here"), (there, "there")):
            for _ in range(4):
                visits.create_task(visit(name, slots.to_read(OWNER)))
            await look_twice()
        visits.create_task(visit("other", there.to_read(OTHER)))
        await look_twice()
    assert order == ["here", "there", "here", "other", *2 * ["here", "there"], "there"]


async def test_slot_is_not_left_to_who_has_gone(
    both: tuple[ReaderSlots, ReaderSlots], rows: tuple[ProcessRow, ProcessRow]
) -> None:
    here, there = both
    async with visiting(there.to_read(OWNER), there.to_read(OWNER)) as readers:
        await readers[1].wait_until_in()
        async with visiting(there.to_read(OWNER)):
            await look_twice()
            async with visiting(here.to_read(OTHER)) as (waiting,):
                await look_twice()
                assert not rows[0].is_next(Wait.TO_READ)
        async with visiting(here.to_read(OTHER)) as (waiting,):
            await readers[0].leave()
            await waiting.wait_until_in()


@pytest.mark.parametrize("ending", ["stuck", "dead"])
async def test_slot_is_not_left_to_a_process_that_is(
    process_table: ProcessTable,
    rows: tuple[ProcessRow, ProcessRow],
    ending: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, there = rows
    there.begin_wait(Wait.TO_READ)
    async with visiting(ReaderSlots(here, 1).to_read(OWNER)) as (waiting,):
        await look_twice()
        assert not waiting.is_in.is_set()
        if ending == "dead":
            process_table.note_death(there.number)
        else:
            monkeypatch.setattr(module, "HEARTBEAT_TIMEOUT_S", 0.0)
        await waiting.wait_until_in()


async def test_who_is_alone_is_so_in_all_processes(
    both: tuple[ReaderSlots, ReaderSlots],
) -> None:
    here, there = both
    async with visiting(here.to_read(OWNER), there.to_probe(OWNER)) as before:
        for visit in before:
            await visit.wait_until_in()
        async with visiting(here.alone(OWNER)) as (alone,):
            await look_twice()
            async with visiting(
                here.to_read(OWNER), there.to_read(OWNER), there.to_probe(OWNER)
            ) as after:
                await look_twice()
                assert not any(v.is_in.is_set() for v in (alone, *after)), "it goes first"
                for visit in before:
                    await visit.leave()
                await alone.wait_until_in()
                await look_twice()
                assert not any(visit.is_in.is_set() for visit in after)
                await alone.leave()
                for visit in after:
                    await visit.wait_until_in()


async def test_two_that_want_to_be_alone_are_so_one_after_the_other(
    both: tuple[ReaderSlots, ReaderSlots],
) -> None:
    async with visiting(both[0].alone(OWNER), both[1].alone(OTHER)) as visits:
        done, _ = await asyncio.wait(
            [asyncio.ensure_future(visit.is_in.wait()) for visit in visits],
            timeout=PATIENCE_S,
            return_when=asyncio.FIRST_COMPLETED,
        )
        assert len(done) == 1
        first, second = sorted(visits, key=lambda visit: not visit.is_in.is_set())
        await first.leave()
        await second.wait_until_in()


async def test_cancelled_waiting_leaves_nothing_behind(
    both: tuple[ReaderSlots, ReaderSlots],
) -> None:
    here, there = both
    async with visiting(here.to_read(OWNER)) as (reader,):
        await reader.wait_until_in()
        async with visiting(there.alone(OWNER), here.to_read(OWNER), here.to_read(OWNER)):
            await look_twice()
    async with visiting(here.alone(OWNER)) as (alone,):
        await alone.wait_until_in()


async def test_an_owner_is_alone_once_at_a_time_and_leaves_others_as_much_time(
    both: tuple[ReaderSlots, ReaderSlots],
) -> None:
    here, there = both
    async with here.alone(OWNER) as is_alone:
        assert is_alone
        async with there.alone(OWNER) as is_alone:
            assert not is_alone
    async with there.alone(OWNER) as is_alone:
        assert not is_alone, "that was true until just now"
    async with there.alone(OTHER) as is_alone:
        assert is_alone
    is_alone_now = False
    async with asyncio.timeout(PATIENCE_S):
        while not is_alone_now:
            await asyncio.sleep(POLL_S)
            async with there.alone(OWNER) as is_alone_now:
                pass
