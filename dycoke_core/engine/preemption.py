"""Decides which sequences make room when another finds none: low-priority ones, for higher
priorities.

A preempted sequence gives back its seat and releases its prefix, which stays or is evicted as the
cache decides, and waits in the place of its age. When it is admitted again it is replayed: its
prompt is prefilled and the tokens that it had are run through the ordinary decode path, so its
answer continues as if nothing had happened. Its video's features are not kept for that, because
memory is short; its frames may have to be fetched again (`Sequence.can_reload_frames`).

A client that asks for low priority agrees to this. Other sequences do not make room, because they
may belong to another client, which has not agreed.

- Sequences with the least work to repeat go first, then the youngest, and no more than are needed.
- If all candidates together would not make enough room, in bytes (`dycoke_core.engine.room`), none
  is preempted.
- No sequence is preempted more than `MAX_PREEMPTIONS` times, or if it was admitted because its turn
  had come while higher priorities waited (`dycoke_core.precedence`). So all of them end.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from dycoke_core.config import PRIORITIES, Priority

MAX_PREEMPTIONS = 2
_MAKES_ROOM = PRIORITIES[-1]


class Preemptible(Protocol):
    @property
    def priority(self) -> Priority: ...

    @property
    def arrival(self) -> int: ...

    @property
    def num_preemptions(self) -> int: ...

    @property
    def has_come_in_turn(self) -> bool: ...

    @property
    def has_work_left(self) -> bool:
        """False: it ends once what is launched has come back."""
        ...

    @property
    def num_tokens_at_stake(self) -> int:
        """Tokens that it may have to compute again."""
        ...


Item = TypeVar("Item", bound=Preemptible)


def choose_victims(
    priority: Priority,
    running: Iterable[Item],
    makes_room: Callable[[Sequence[Item]], bool],
) -> list[Item]:
    """The sequences to preempt; empty if that would not help, or is not needed.

    Args:
        priority: that of the sequence that needs room.
        makes_room: whether there is room once these have gone.
    """
    if priority == _MAKES_ROOM:
        return []
    candidates = sorted(
        filter(_may_be_preempted, running),
        key=lambda item: (item.num_tokens_at_stake, -item.arrival),
    )
    if not candidates or makes_room([]) or not makes_room(candidates):
        return []
    victims: list[Item] = []
    while not makes_room(victims):
        victims.append(candidates[len(victims)])
    for item in victims[:-1]:  # a later one may have made enough room without it
        others = [other for other in victims if other is not item]
        if makes_room(others):
            victims = others
    return victims


def _may_be_preempted(item: Preemptible) -> bool:
    return (
        item.priority == _MAKES_ROOM
        and item.num_preemptions < MAX_PREEMPTIONS
        and not item.has_come_in_turn
        and item.has_work_left
    )
