"""What a worker knows of a queue: its share of what waits, and the rate of arrivals."""

import pytest

from app.store.queue_snapshot import QueueSnapshot
from dycoke_core.config import Priority
from dycoke_core.precedence import RANKS


def test_few_arrivals_have_no_rate() -> None:
    assert QueueSnapshot.read(b"10000 1 7 2000 10000").outlook().arrivals_per_s == 0.0
    assert QueueSnapshot().outlook().waited_s == ()


def test_the_last_arrivals_are_told_beside_all_that_are_known() -> None:
    burst = QueueSnapshot.read(b"10000 2 32 2000 9000").outlook()
    assert 31 / 9 / 2 < burst.arrivals_per_s <= 31 / 8 / 2
    assert 7 / 2 / 2 < burst.last_arrivals_per_s <= 7 / 2
    assert 1 <= burst.last_s < 2


@pytest.mark.parametrize(
    ("priority", "ages_s"),
    [("high", [5000]), ("normal", [5000, 3000, 1000]), ("low", [9000, 5000, 3000, 2000, 1000])],
)
def test_jobs_of_worse_priority_do_not_count(priority: Priority, ages_s: list[int]) -> None:
    queue = QueueSnapshot.read(
        b"10000000 1 9 2000 2000 1000000:low 5000000:high 7000000 8000000:low 9000000:new"
    )
    outlook = queue.outlook(worst_rank=RANKS[priority])
    assert outlook.waited_s == pytest.approx(ages_s, abs=400)


def test_workers_divide_the_jobs_that_count() -> None:
    queue = QueueSnapshot.read(
        b"10000000 2 9 2000 2000 1000000:low 5000000 7000000 8000000:low 9000000"
    )
    outlook = queue.outlook(worst_rank=RANKS["normal"])
    assert outlook.waited_s == pytest.approx([3000], abs=400)
