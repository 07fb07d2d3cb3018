"""Decides who may run when suspects and other jobs both wait: each kind gets its share of time.

A suspect has the engine to itself until it is cleared. If the next suspect waited for the whole
answer of the last one, and all other jobs waited for both, a crash with many jobs in the engine
would stop a worker for minutes. So suspects are tried one right after another for `PROBATION_S`,
each set aside once it is cleared; then the jobs that are not suspected run together for `OTHERS_S`
before the next try.

Knows no jobs; the caller supplies the clock.
"""

from enum import Enum, auto

PROBATION_S = 5.0
OTHERS_S = 10.0


class MayRun(Enum):
    ANY = auto()
    SUSPECTS = auto()  # the running suspect has just been cleared: try the next
    OTHERS = auto()


class Probation:
    def __init__(self) -> None:
        self._suspects_until = 0.0
        self._others_until = 0.0

    def who(self, now: float) -> MayRun:
        if now < self._suspects_until:
            return MayRun.SUSPECTS
        return MayRun.OTHERS if now < self._others_until else MayRun.ANY

    def begin_probation(self, now: float) -> None:
        """A suspect has the engine to itself."""
        if self.who(now) is not MayRun.SUSPECTS:
            self._suspects_until = now + PROBATION_S
            self._others_until = self._suspects_until + OTHERS_S

    def none_waits(self) -> None:
        """None of the jobs that may run is waiting."""
        self._suspects_until = self._others_until = 0.0
