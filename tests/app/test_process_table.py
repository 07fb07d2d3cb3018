"""What processes know of each other: counts of those alive, locks that end with their process."""

import subprocess
import sys
import time

import pytest

from app import process_table as module
from app.process_table import ProcessTable, Wait

HOLDER = """
import sys, time
from app.process_table import ProcessTable
table = ProcessTable(int(sys.argv[1]))
row = table.take_row(1)
row.beat()
row.add_stream("a", 3)
row.add_stored(1000, 3)
row.add_incoming_bytes("a", 50)
assert table.try_lock(7)
print("holding", flush=True)
time.sleep(600)
"""


def test_numbers_of_another_process_are_seen_and_cleared_at_its_death(
    process_table: ProcessTable,
) -> None:
    row = process_table.take_row(0)
    row.add_stream("a", 1)
    row.add_stream("b", 1)
    row.add_stored(-200, -1)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(process_table.fd)],
        pass_fds=[process_table.fd],
        stdout=subprocess.PIPE,
    ) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"holding\n"
            assert process_table.num_streams() == 5
            assert [process_table.num_streams(client) for client in "abc"] == [4, 1, 0]
            assert process_table.incoming_bytes("a") == 50
            assert (process_table.stored_bytes(), process_table.stored_videos()) == (800, 2)
            assert process_table.incoming_bytes() == 50
            assert process_table.is_alive(1) and not process_table.is_alive(0)
            assert process_table.try_lock(7) is None
            assert process_table.try_lock(8) is not None
        finally:
            holder.kill()
    lock = process_table.try_lock(7)
    assert lock is not None, "it is gone with its process"
    process_table.note_death(1)
    assert process_table.num_streams() == 2
    assert [process_table.num_streams(client) for client in "abc"] == [1, 1, 0]
    assert process_table.deaths(1) == 1 and process_table.deaths(0) == 0
    assert not process_table.is_alive(1)
    assert process_table.stored_bytes() == 800, "what is stored stays"
    assert process_table.stored_videos() == 2
    assert process_table.incoming_bytes() == 0, "and nothing comes in"


def test_clients_that_share_a_counter_are_told_apart_by_the_other(
    process_table: ProcessTable,
) -> None:
    """Of 200 clients in 4,096 counters some ten pairs share one; both, hardly ever."""
    row = process_table.take_row(0)
    for number in range(200):
        row.add_stream(f"client {number}", number)
    held = [process_table.num_streams(f"client {number}") for number in range(200)]
    assert all(found >= number for number, found in enumerate(held)), "never too few"
    assert sum(found > number for number, found in enumerate(held)) <= 5
    assert process_table.num_streams() == sum(range(200))


def test_lock_is_exclusive_within_a_process_too(process_table: ProcessTable) -> None:
    lock = process_table.try_lock(3)
    assert lock is not None and process_table.try_lock(3) is None
    lock.release()
    lock.release()
    again = process_table.try_lock(3)
    assert again is not None
    again.release()


def test_process_that_starts_anew_finds_its_row_cleared(process_table: ProcessTable) -> None:
    row = process_table.take_row(1)
    row.add_stream("a", 4)
    row.set_connections(9)
    row.begin_drain()
    process_table.take_row(1).beat()
    assert process_table.num_streams() == process_table.num_streams("a") == 0
    assert process_table.fewest_connections() == 0
    assert process_table.has_other_open(0)


def test_stuck_process_is_not_alive(
    process_table: ProcessTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, other = process_table.take_row(0), process_table.take_row(1)
    for each in (row, other):
        each.beat()
    other.set_connections(1)
    row.set_connections(2)
    assert process_table.fewest_connections() == 1
    late_ns = time.monotonic_ns() + int(module.HEARTBEAT_TIMEOUT_S * 1e9) + 1
    monkeypatch.setattr(module.time, "monotonic_ns", lambda: late_ns)
    assert process_table.fewest_connections() is None
    row.beat()
    assert process_table.fewest_connections() == 2
    assert not process_table.has_other_open(0)


def test_who_has_waited_longest_of_the_living_is_next(process_table: ProcessTable) -> None:
    row, other = process_table.take_row(0), process_table.take_row(1)
    other.begin_wait(Wait.TO_READ)
    row.begin_wait(Wait.TO_READ)
    row.begin_wait(Wait.TO_PROBE)
    assert row.is_next(Wait.TO_READ), "the other one does not live"
    for each in (row, other):
        each.beat()
    assert other.is_next(Wait.TO_READ) and not row.is_next(Wait.TO_READ)
    assert row.is_next(Wait.TO_PROBE), "it is the only holder of that"
    other.end_wait(Wait.TO_READ)
    assert row.is_next(Wait.TO_READ)
    other.begin_wait(Wait.TO_READ)
    assert row.is_next(Wait.TO_READ) and not other.is_next(Wait.TO_READ)
    row.leave()
    row.begin_wait(Wait.TO_READ)
    assert other.is_next(Wait.TO_READ)


def test_what_ends_after_its_process_has_left_counts_no_longer(
    process_table: ProcessTable,
) -> None:
    row = process_table.take_row(0)
    row.add_stream("a", 2)
    row.add_incoming_bytes("a", 50)
    row.leave()
    row.add_stream("a", -2)
    row.add_incoming_bytes("a", -50)
    assert process_table.num_streams() == process_table.num_streams("a") == 0
    assert process_table.incoming_bytes() == process_table.incoming_bytes("a") == 0


def test_draining_or_leaving_process_is_not_open(process_table: ProcessTable) -> None:
    other = process_table.take_row(1)
    other.beat()
    assert process_table.has_other_open(0) and not process_table.has_other_open(1)
    other.begin_drain()
    assert not process_table.has_other_open(0) and process_table.is_alive(1)
    other.leave()
    assert not process_table.is_alive(1)
