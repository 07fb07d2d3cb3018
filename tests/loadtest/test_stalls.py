"""A load generator that stalled is noticed, and its run repeated."""

import threading
import time
from dataclasses import dataclass

import pytest

from loadtest import stalls
from loadtest.stalls import MAX_ATTEMPTS, MAX_STALL_S, StallWatch, repeat_stalled


@dataclass
class Run:
    max_stall_s: float


def test_run_without_a_long_stall_counts_at_once() -> None:
    runs = iter([Run(MAX_STALL_S), Run(0.0)])
    assert repeat_stalled(lambda: next(runs)).max_stall_s == MAX_STALL_S
    assert next(runs).max_stall_s == 0.0, "there was no second run"


def test_run_with_a_long_stall_is_repeated_and_the_last_one_counts() -> None:
    runs = iter([Run(9.0 - number) for number in range(MAX_ATTEMPTS + 1)])
    assert repeat_stalled(lambda: next(runs)).max_stall_s == 9.0 - (MAX_ATTEMPTS - 1)
    assert next(runs).max_stall_s == 9.0 - MAX_ATTEMPTS


def test_watch_notices_what_was_late_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = StallWatch()

    def oversleep(seconds: float) -> None:
        watch.is_over = True
        real_sleep(seconds + 0.2)

    real_sleep = time.sleep
    monkeypatch.setattr(stalls.time, "sleep", oversleep)
    thread = threading.Thread(target=watch.watch)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    noticed_s = watch.max_stall_s
    assert noticed_s >= 0.2
    watch.note(0.1)
    assert watch.max_stall_s == noticed_s
    watch.note(60.0)
    assert watch.max_stall_s == 60.0
