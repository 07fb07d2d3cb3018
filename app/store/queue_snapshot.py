"""What waits for the workers of a model, as a worker learns it with every job that it gets."""

import time
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

from dycoke_core.config import DEFAULT_PRIORITY
from dycoke_core.level_choice import Outlook
from dycoke_core.precedence import RANKS

LAST_ARRIVALS = 8  # fewer have no rate; `lua/prelude.lua` has it too

_RANKS = {str(priority): rank for priority, rank in RANKS.items()}
_WORST_RANK = max(RANKS.values())


class Queued(NamedTuple):
    at_ms: int
    rank: int

    @classmethod
    def read(cls, word: str) -> Self:
        at_ms, _, priority = word.partition(":")
        return cls(int(at_ms), _RANKS.get(priority, RANKS[DEFAULT_PRIORITY]))


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """Times are milliseconds of Redis's clock, which jobs are known by here, but for `read_at`.

    Args:
        now_ms: when it was so; `read_at`: on the monotonic clock.
        num_workers: that share what waits.
        num_arrivals: recent ones; `first_arrival_ms` is the first of them, `last_arrival_ms` the
            first of the last `LAST_ARRIVALS`.
        queued: the oldest waiting jobs, oldest first.
    """

    now_ms: int = 0
    num_workers: int = 1
    num_arrivals: int = 0
    first_arrival_ms: int = 0
    last_arrival_ms: int = 0
    queued: tuple[Queued, ...] = ()
    read_at: float = field(default_factory=time.monotonic)

    @classmethod
    def read(cls, words: bytes) -> Self:
        """From what `queue_snapshot` of `lua/prelude.lua` says, just now."""
        now_ms, num_workers, num_arrivals, first_ms, last_ms, *queued = words.decode().split()
        return cls(
            int(now_ms),
            max(int(num_workers), 1),
            int(num_arrivals),
            int(first_ms),
            int(last_ms),
            tuple(map(Queued.read, queued)),
        )

    @property
    def queued_ms(self) -> tuple[int, ...]:
        return tuple(job.at_ms for job in self.queued)

    def without(self, queued_ms: int) -> Self:
        """Without a job that was queued then, if it has one."""
        if queued_ms not in self.queued_ms:
            return self
        place = self.queued_ms.index(queued_ms)
        return replace(self, queued=self.queued[:place] + self.queued[place + 1 :])

    def outlook(self, held_at: tuple[float, ...] = (), *, worst_rank: int = _WORST_RANK) -> Outlook:
        """This worker's share of what waits, and what it holds back itself.

        Args:
            held_at: when the jobs that this worker holds back were queued, on the monotonic clock;
                they come first.
            worst_rank: of the jobs that count.
        """
        now = time.monotonic()
        counted = [job.at_ms for job in self.queued if job.rank <= worst_rank]
        share = counted[self.num_workers - 1 :: self.num_workers]
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
