"""What waits for the workers of a model, as a worker learns it with every job that it is given."""

import time
from dataclasses import dataclass
from typing import Self

from dycoke_core.level_choice import Outlook

MIN_ARRIVALS = 8  # fewer have no rate


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """Times are seconds of the monotonic clock.

    Args:
        num_workers: that share what waits.
        num_arrivals: recent ones; `first_arrival_at` is the first of them.
        queued_at: when each of the oldest waiting jobs was queued, oldest first.
    """

    num_workers: int = 1
    num_arrivals: int = 0
    first_arrival_at: float = 0.0
    queued_at: tuple[float, ...] = ()

    @classmethod
    def read(cls, words: bytes) -> Self:
        """From what `queue_snapshot` of `lua/prelude.lua` says, just now."""
        now_ms, num_workers, num_arrivals, *times_ms = map(int, words.split())
        here = time.monotonic()
        first_arrival_at, *queued_at = (here - (now_ms - at_ms) / 1000 for at_ms in times_ms)
        return cls(max(num_workers, 1), num_arrivals, first_arrival_at, tuple(queued_at))

    def outlook(self, held_at: tuple[float, ...] = ()) -> Outlook:
        """This worker's share of what waits, and what it holds back itself.

        Args:
            held_at: when the jobs that this worker holds back were queued; they come first.
        """
        now = time.monotonic()
        share = self.queued_at[self.num_workers - 1 :: self.num_workers]
        arrivals_per_s = 0.0
        if self.num_arrivals >= MIN_ARRIVALS:
            seconds = max(now - self.first_arrival_at, 1e-3)
            arrivals_per_s = (self.num_arrivals - 1) / seconds / self.num_workers
        return Outlook(tuple(now - at for at in (*held_at, *share)), arrivals_per_s)
