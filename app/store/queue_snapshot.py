"""What waits for the workers of a model, as a worker learns it with every job that it is given."""

import time
from dataclasses import dataclass, field, replace
from typing import Self

from dycoke_core.level_choice import Outlook

LAST_ARRIVALS = 8  # fewer have no rate; `lua/prelude.lua` has it too


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """Times are milliseconds of Redis's clock, which jobs are known by here, but for `read_at`.

    Args:
        now_ms: when it was so; `read_at`: on the monotonic clock.
        num_workers: that share what waits.
        num_arrivals: recent ones; `first_arrival_ms` is the first of them, `last_arrival_ms` the
            first of the last `LAST_ARRIVALS`.
        queued_ms: when each of the oldest waiting jobs was queued, oldest first.
    """

    now_ms: int = 0
    num_workers: int = 1
    num_arrivals: int = 0
    first_arrival_ms: int = 0
    last_arrival_ms: int = 0
    queued_ms: tuple[int, ...] = ()
    read_at: float = field(default_factory=time.monotonic)

    @classmethod
    def read(cls, words: bytes) -> Self:
        """From what `queue_snapshot` of `lua/prelude.lua` says, just now."""
        now_ms, num_workers, num_arrivals, first_ms, last_ms, *queued_ms = map(int, words.split())
        num_workers = max(num_workers, 1)
        return cls(now_ms, num_workers, num_arrivals, first_ms, last_ms, tuple(queued_ms))

    def without(self, queued_ms: int) -> Self:
        """Without a job that was queued then, if it has one."""
        if queued_ms not in self.queued_ms:
            return self
        place = self.queued_ms.index(queued_ms)
        return replace(self, queued_ms=self.queued_ms[:place] + self.queued_ms[place + 1 :])

    def outlook(self, held_at: tuple[float, ...] = ()) -> Outlook:
        """This worker's share of what waits, and what it holds back itself.

        Args:
            held_at: when the jobs that this worker holds back were queued, on the monotonic clock;
                they come first.
        """
        now = time.monotonic()
        share = self.queued_ms[self.num_workers - 1 :: self.num_workers]
        held_s = (now - at for at in held_at)
        waited_s = (*held_s, *(self._age_s(at_ms, now) for at_ms in share))
        all_s, last_s = (
            self._age_s(at_ms, now) for at_ms in (self.first_arrival_ms, self.last_arrival_ms)
        )
        return outlook(waited_s, self.num_arrivals, all_s, last_s, num_workers=self.num_workers)

    def _age_s(self, at_ms: int, now: float) -> float:
        return now - self.read_at + (self.now_ms - at_ms) / 1000


def outlook(
    waited_s: tuple[float, ...],
    num_arrivals: int,
    all_s: float,
    last_s: float,
    *,
    num_workers: int = 1,
) -> Outlook:
    """One worker's share of what comes, and what waits for it.

    Args:
        all_s: since the first of the arrivals.
        last_s: since the first of the last `LAST_ARRIVALS`.
    """
    if num_arrivals < LAST_ARRIVALS:
        return Outlook(waited_s)
    all_per_s = (num_arrivals - 1) / max(all_s, 1e-3) / num_workers
    last_per_s = (LAST_ARRIVALS - 1) / max(last_s, 1e-3) / num_workers
    return Outlook(waited_s, all_per_s, last_per_s, last_s)
