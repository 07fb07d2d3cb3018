"""The rate of a body, with seconds that a test counts."""

from app.api.connection.pace import Pace


def test_a_body_lags_by_what_its_bytes_should_have_taken_less() -> None:
    pace = Pace()
    pace.wait(3.0)
    pace.take(1000, bytes_s=500.0)
    assert pace.behind_s == 1.0


def test_bytes_that_come_fast_earn_no_credit() -> None:
    pace = Pace()
    pace.take(10**9, bytes_s=1.0)
    assert pace.behind_s == 0.0
    pace.wait(0.5)
    assert pace.behind_s == 0.5


def test_fast_bytes_make_up_for_slow_ones_before_them() -> None:
    pace = Pace()
    for seconds, num_bytes in ((2.0, 100), (2.0, 100), (0.0, 200)):
        pace.wait(seconds)
        pace.take(num_bytes, bytes_s=100.0)
    assert pace.behind_s == 0.0
