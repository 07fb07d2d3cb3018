"""How slow a body may be, by how many are under way, on a clock of the test's own."""

import asyncio
from typing import Any

import pytest
from starlette.types import Message

from app.api.connection.bodies import (
    BUSY_MIN_BYTES_S,
    FIRST_BYTE_S,
    IDLE_S,
    MIN_BYTES_S,
    BodySlot,
    BodySlots,
    clients_of,
)
from app.errors import TooManyUploadsError, UploadTimeoutError
from app.keys.entries import ANONYMOUS
from app.process_table import ProcessRow, ProcessTable


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time passes when the test says so, and whose timers see it."""

    now_s = 1000.0

    def time(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Any:
    loop = Clock()
    yield loop
    loop.close()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def body(slot: BodySlot, size: int) -> None:
    async def receive() -> Message:
        return {"type": "http.request", "body": bytes(size), "more_body": True}

    await slot.next(receive)


async def comes_after(clock: Clock, slot: BodySlot, seconds: float, size: int) -> bool:
    """Whether a part of a body that comes after so long is still waited for."""
    has_come = asyncio.Event()

    async def receive() -> Message:
        await has_come.wait()
        return {"type": "http.request", "body": bytes(size), "more_body": True}

    waiting = asyncio.ensure_future(slot.next(receive))
    await settle()
    clock.now_s += seconds
    await settle()
    has_come.set()
    results = await asyncio.gather(waiting, return_exceptions=True)
    assert isinstance(results[0], dict | UploadTimeoutError), results
    return isinstance(results[0], dict)


async def lasts_for(clock: Clock, slot: BodySlot, seconds: float) -> bool:
    """Whether a body that sends nothing more is still waited for after so long."""

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    waiting = asyncio.ensure_future(slot.next(receive))
    await settle()
    clock.now_s += seconds
    await settle()
    is_waiting = not waiting.done()
    waiting.cancel()
    results = await asyncio.gather(waiting, return_exceptions=True)
    assert is_waiting or isinstance(results[0], UploadTimeoutError)
    return is_waiting


def new_row() -> ProcessRow:
    return ProcessTable.create(1).take_row(0)


def slots_of(row: ProcessRow, max_bodies: int, max_per_client: int) -> BodySlots:
    return BodySlots(row, max_bodies=max_bodies, max_per_client=max_per_client)


def slots_at(load: float) -> tuple[BodySlots, BodySlot]:
    slots = slots_of(new_row(), 100, 100)
    taken = [slots.take(f"{n}") for n in range(round(100 * load))]
    return slots, taken[0]


@pytest.mark.parametrize("load", [0.01, 1.0])
@pytest.mark.parametrize(("seconds", "expected"), [(-0.1, True), (0.1, False)])
def test_first_byte_comes_soon(clock: Clock, load: float, seconds: float, expected: bool) -> None:
    async def run() -> None:
        _, slot = slots_at(load)
        assert await lasts_for(clock, slot, FIRST_BYTE_S + seconds) is expected

    clock.run_until_complete(run())


@pytest.mark.parametrize(
    ("load", "patience_s", "bytes_s"),
    [(0.01, IDLE_S - 0.5, MIN_BYTES_S * 1.04), (1.0, FIRST_BYTE_S, BUSY_MIN_BYTES_S)],
)
def test_silence_and_slowness_are_borne_while_there_is_room(
    clock: Clock, load: float, patience_s: float, bytes_s: float
) -> None:
    async def run() -> None:
        _, slot = slots_at(load)
        await body(slot, 10)
        assert await lasts_for(clock, slot, patience_s - 1)
        assert not await lasts_for(clock, slot, 3)
        _, slot = slots_at(load)
        await body(slot, round(bytes_s * 600))
        assert await lasts_for(clock, slot, patience_s - 1)
        assert not await lasts_for(clock, slot, 3), "what came fast is no credit"

    clock.run_until_complete(run())


@pytest.mark.parametrize(("load", "bytes_s"), [(0.01, MIN_BYTES_S * 1.04), (1.0, BUSY_MIN_BYTES_S)])
def test_body_that_keeps_the_rate_may_last(clock: Clock, load: float, bytes_s: float) -> None:
    """Also where it comes in bursts, within the patience there is."""

    async def run() -> None:
        _, slot = slots_at(load)
        await body(slot, 1)
        for _ in range(300):
            assert await comes_after(clock, slot, 4.0, round(bytes_s * 4))

    clock.run_until_complete(run())


@pytest.mark.parametrize("load", [0.01, 1.0])
def test_body_that_drips_after_it_came_fast_is_given_up(clock: Clock, load: float) -> None:
    async def run() -> None:
        _, slot = slots_at(load)
        await body(slot, 511 * 2**20)
        num_drips = 0
        while await comes_after(clock, slot, 4.0, 1):
            num_drips += 1
        assert num_drips <= IDLE_S / 4

    clock.run_until_complete(run())


def test_time_that_the_reader_takes_is_not_the_senders(clock: Clock) -> None:
    async def run() -> None:
        _, slot = slots_at(1.0)
        for _ in range(3):
            await body(slot, 10)
            clock.now_s += 100
        assert await lasts_for(clock, slot, FIRST_BYTE_S - 1)

    clock.run_until_complete(run())


def test_slow_body_is_given_up_when_others_come(clock: Clock) -> None:
    async def run() -> None:
        slots = slots_of(new_row(), 4, 4)
        slot = slots.take("slow")
        await body(slot, 10)

        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        waiting = asyncio.ensure_future(slot.next(receive))
        await settle()
        clock.now_s += FIRST_BYTE_S + 1
        await settle()
        assert not waiting.done()
        for n in range(3):
            slots.take(f"{n}")
        await settle()
        with pytest.raises(UploadTimeoutError):
            await waiting

    clock.run_until_complete(run())


def test_body_whose_time_is_up_harms_nobody_who_comes_in_that_moment(clock: Clock) -> None:
    async def run() -> None:
        slots = slots_of(new_row(), 4, 4)

        async def receive() -> Message:
            try:
                await asyncio.Event().wait()
            finally:  # the time is up, and the task has not heard of it yet
                slots.take("other")
            raise AssertionError

        waiting = asyncio.create_task(slots.take("slow").next(receive))
        await settle()
        clock.now_s += FIRST_BYTE_S + 1
        with pytest.raises(UploadTimeoutError):
            await waiting

    clock.run_until_complete(run())


async def test_slots_are_bounded_in_all_processes_together_and_for_each_client(
    process_table: ProcessTable,
) -> None:
    here, there = (slots_of(process_table.take_row(number), 3, 2) for number in range(2))
    first = here.take("key a", "address 1")
    there.take("key a", "address 2")
    for clients in (("key a", "address 3"), ("key a",)):
        for slots in (here, there):
            with pytest.raises(TooManyUploadsError):
                slots.take(*clients)
    here.take("key b", "address 2")
    with pytest.raises(TooManyUploadsError):
        there.take("key c", "address 9")
    first.release()
    first.release()
    there.take("key a", "address 1")
    assert here.load == there.load == 1.0
    process_table.note_death(1)
    assert here.load == 1 / 3, "those of a dead process are free"
    here.take("key a", "address 1")


@pytest.mark.parametrize(
    ("owner", "address", "expected"),
    [
        ("key_x", "192.0.2.1", ["key key_x", "address 192.0.2.1"]),
        (ANONYMOUS, "192.0.2.1", ["address 192.0.2.1"]),
        (ANONYMOUS, "2001:db8:1:2:3::4", ["address 2001:db8:1:2::/64"]),
        (ANONYMOUS, "::ffff:192.0.2.1", ["address 192.0.2.1"]),
        (ANONYMOUS, None, []),
    ],
)
def test_clients_are_keys_and_networks(
    owner: str, address: str | None, expected: list[str]
) -> None:
    assert clients_of({"client": (address, 1) if address else None}, owner) == expected
