"""A clock that differs from the job store's is told once."""

import time

import pytest

from app.worker.clock_check import ClockCheck


def test_a_difference_is_logged_when_it_appears(caplog: pytest.LogCaptureFixture) -> None:
    check = ClockCheck()
    for off_s, num_lines in ((0, 0), (-3600, 1), (-3600, 1), (0, 1), (3600, 2)):
        check.note(time.time() + off_s)
        assert len(caplog.records) == num_lines
    ahead_s = [record.__dict__["ahead_s"] for record in caplog.records]
    assert ahead_s == pytest.approx([3600, -3600], abs=60)
