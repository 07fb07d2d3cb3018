"""What a worker knows of a queue: its share of what waits, and the rate of arrivals."""

from app.store.queue_snapshot import QueueSnapshot


def test_few_arrivals_have_no_rate() -> None:
    assert QueueSnapshot.read(b"10000 1 7 2000 10000").outlook().arrivals_per_s == 0.0
    assert QueueSnapshot().outlook().waited_s == ()


def test_the_last_arrivals_are_told_beside_all_that_are_known() -> None:
    burst = QueueSnapshot.read(b"10000 2 32 2000 9000").outlook()
    assert 31 / 9 / 2 < burst.arrivals_per_s <= 31 / 8 / 2
    assert 7 / 2 / 2 < burst.last_arrivals_per_s <= 7 / 2
    assert 1 <= burst.last_s < 2
