"""Notices a load generator that stood still, and repeats what it measured then."""

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

MAX_STALL_S = 1.0  # of the load generator; a run with a longer stall is repeated
MAX_ATTEMPTS = 3  # the last one always counts; its stall is in the report
PERIOD_S = 0.1


class Measured(Protocol):
    @property
    def max_stall_s(self) -> float: ...


Run = TypeVar("Run", bound=Measured)


class StallWatch:
    """For how long the load generator, or the whole machine, stood still at most."""

    def __init__(self) -> None:
        self.max_stall_s = 0.0
        self.is_over = False

    def watch(self) -> None:
        """Sleeps and looks at the clock, in a thread or greenlet of its own."""
        while not self.is_over:
            asleep_at_s = time.perf_counter()
            time.sleep(PERIOD_S)
            self.note(time.perf_counter() - asleep_at_s - PERIOD_S)

    def note(self, late_s: float) -> None:
        """Takes in that something was late."""
        self.max_stall_s = max(self.max_stall_s, late_s)


def repeat_stalled(run: Callable[[], Run]) -> Run:
    """The first run without a long stall, or else the last one."""
    for _ in range(MAX_ATTEMPTS):
        result = run()
        if result.max_stall_s <= MAX_STALL_S:
            break
        print(f"The load generator stood still for {result.max_stall_s:.1f} s.", flush=True)
    return result
