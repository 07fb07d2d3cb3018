"""What a worker makes of a queue: its share of what waits, and the rate of arrivals."""

from app.store.queue_snapshot import QueueSnapshot


def test_few_arrivals_have_no_rate() -> None:
    assert QueueSnapshot.read(b"10000 1 7 2000").outlook().arrivals_per_s == 0.0
    assert QueueSnapshot().outlook().waited_s == ()
