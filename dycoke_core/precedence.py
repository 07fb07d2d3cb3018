"""Decides who goes first where sequences compete: by priority, then by age, so that nothing
starves.

The highest priority goes first, and within it the oldest. But after the oldest of all has been
passed over `MAX_OVERTAKES` times in a row, it is its turn, whatever its priority. So a sequence
with n older ones before it is served at the latest as the (n + 1) * (MAX_OVERTAKES + 1)-th, however
many of higher priority keep coming. If all have the same priority, it is first come, first served.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

from dycoke_core.config import PRIORITIES, Priority

MAX_OVERTAKES = 4
RANKS = {priority: rank for rank, priority in enumerate(PRIORITIES)}  # 0: goes first

Item = TypeVar("Item")


def best(*priorities: Priority) -> Priority:
    return min(priorities, key=RANKS.__getitem__)


class Precedence:
    """Decides in one place where sequences compete, and remembers whose turn it is there."""

    def __init__(self) -> None:
        self._num_overtakes = 0  # of the oldest, in a row

    def ordered(self, items: Iterable[Item], priority: Callable[[Item], Priority]) -> list[Item]:
        """Those that compete, in the order in which they are to be served.

        Args:
            items: oldest first.
        """
        num_first = 1 if self._num_overtakes >= MAX_OVERTAKES else 0
        by_age = list(items)
        rest = sorted(by_age[num_first:], key=lambda item: RANKS[priority(item)])
        return by_age[:num_first] + rest

    def note(self, *, is_oldest_served: bool) -> None:
        """Takes in that somebody was served."""
        self._num_overtakes = 0 if is_oldest_served else self._num_overtakes + 1
