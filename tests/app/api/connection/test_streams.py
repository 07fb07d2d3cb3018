"""Open answers of all processes together."""

import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import Request

from app.api.connection.bodies import BODY, BodySlot, BodySlots
from app.api.connection.streams import StreamSlot, StreamSlots
from app.errors import TooManyStreamsError
from app.keys.entries import ANONYMOUS
from app.metrics import ApiMetrics
from app.process_table import ProcessTable

OWNER, OTHER = "owner", "other"


def slots_of(table: ProcessTable, slot: int, max_streams: int) -> StreamSlots:
    return StreamSlots(max_streams, table.take_row(slot), ApiMetrics(CollectorRegistry()))


def take(
    slots: StreamSlots,
    owner: str = OWNER,
    *,
    address: str = "192.0.2.1",
    body: BodySlot | None = None,
    is_upload: bool = False,
) -> StreamSlot:
    scope = {"type": "http", "headers": [], "client": (address, 1), BODY: body}
    return slots.take(Request(scope), owner, is_upload=is_upload)


def pending_body() -> BodySlot:
    row = ProcessTable.create(1).take_row(0)
    return BodySlots(row, max_bodies=9, max_per_client=9).take()


def test_limit_holds_for_all_processes_together(process_table: ProcessTable) -> None:
    here, there = (slots_of(process_table, slot, 3) for slot in range(2))
    taken = [take(here), take(here), take(there)]
    for slots in (here, there):
        with pytest.raises(TooManyStreamsError):
            take(slots)
    taken[0].release()
    taken[0].release()
    take(there)
    with pytest.raises(TooManyStreamsError):
        take(here)
    assert process_table.num_streams() == 3


def test_streams_of_a_dead_process_make_room(process_table: ProcessTable) -> None:
    here, there = (slots_of(process_table, slot, 2) for slot in range(2))
    take(there)
    take(there)
    with pytest.raises(TooManyStreamsError):
        take(here)
    process_table.note_death(1)
    take(here)
    take(here)
    with pytest.raises(TooManyStreamsError):
        take(here)


def test_who_has_all_of_the_first_keeps_nobody_out(process_table: ProcessTable) -> None:
    """In either process; the other clients share as many again, and none of them has more."""
    here, there = (slots_of(process_table, slot, 8) for slot in range(2))
    for number in range(8):
        take(here if number % 2 else there)
    for slots in (here, there):
        with pytest.raises(TooManyStreamsError):
            take(slots)
    for number in range(4):
        take(here if number % 2 else there, OTHER)
    with pytest.raises(TooManyStreamsError):
        take(here, OTHER)
    take(there, "a third")
    assert process_table.num_streams() == 13


def test_many_clients_together_never_have_more_than_twice_as_many(
    process_table: ProcessTable,
) -> None:
    slots = slots_of(process_table, 0, 4)
    for number in range(8):
        take(slots, f"owner {number}")
    with pytest.raises(TooManyStreamsError):
        take(slots)


def test_without_keys_addresses_have_shares(process_table: ProcessTable) -> None:
    slots = slots_of(process_table, 0, 2)
    take(slots, ANONYMOUS)
    take(slots, ANONYMOUS)
    with pytest.raises(TooManyStreamsError):
        take(slots, ANONYMOUS)
    take(slots, ANONYMOUS, address="198.51.100.1")


async def test_body_that_is_to_come_counts_from_its_end(process_table: ProcessTable) -> None:
    here, there = (slots_of(process_table, slot, 2) for slot in range(2))
    pending = pending_body()
    slot = take(here, body=pending)
    assert process_table.num_streams() == 0
    take(there, OTHER)
    pending.finish()
    assert process_table.num_streams() == 2 == process_table.num_streams(f"key {OWNER}") + 1
    slot.release()
    await here.wait_until_none()
    assert process_table.num_streams() == 1


async def test_server_that_is_full_by_the_bodys_end_refuses_whoever_reads_it(
    process_table: ProcessTable,
) -> None:
    here, there = (slots_of(process_table, slot, 1) for slot in range(2))
    pending = pending_body()
    slot = take(here, body=pending)
    take(there)
    with pytest.raises(TooManyStreamsError):
        pending.finish()
    slot.release()
    assert process_table.num_streams() == 1
    with pytest.raises(TooManyStreamsError):
        take(here, body=pending)
    await here.wait_until_none()


async def test_upload_keeps_its_bodys_slot_until_there_is_room_for_the_answer(
    process_table: ProcessTable,
) -> None:
    slots = slots_of(process_table, 0, 1)
    bodies = BodySlots(process_table.take_row(1), max_bodies=1, max_per_client=1)
    pending = bodies.take()
    slot = take(slots, body=pending, is_upload=True)
    other = take(slots)
    pending.finish()
    assert bodies.load == 1.0 and not slot.is_open
    with pytest.raises(TooManyStreamsError):
        slot.open()
    assert bodies.load == 1.0 and process_table.num_streams() == 1
    other.release()
    for _ in range(2):
        slot.open()
        assert bodies.load == 0.0 and process_table.num_streams() == 1
    slot.release()
    assert process_table.num_streams() == 0


async def test_upload_that_finds_room_at_its_end_counts_from_there(
    process_table: ProcessTable,
) -> None:
    slots = slots_of(process_table, 0, 1)
    bodies = BodySlots(process_table.take_row(1), max_bodies=1, max_per_client=1)
    pending = bodies.take()
    slot = take(slots, body=pending, is_upload=True)
    pending.finish()
    assert bodies.load == 0.0 and slot.is_open and process_table.num_streams() == 1


async def test_request_that_ends_before_its_body_never_counts(process_table: ProcessTable) -> None:
    slots = slots_of(process_table, 0, 1)
    pending = pending_body()
    take(slots, body=pending).release()
    pending.finish()
    assert process_table.num_streams() == 0
    await slots.wait_until_none()
