"""What a seed determines: which faults happen when, and what clients ask. Pure functions."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.chaos.ledger import POISON, Question

NUM_CLIPS = 6
MANNERS = {
    "stream": 6,  # reads to the end, resuming where a connection breaks
    "resume": 3,  # disconnects now and then, and resumes
    "whole": 2,  # stream=false
    "desert": 2,  # leaves with on_disconnect=continue, reads it all later
    "abort": 2,  # leaves, which cancels
    "delete": 1,  # asks for a cancel at the other API
    "retry": 3,  # leaves and posts the same again, with its key, at the other API
    "audience": 1,  # is read by three at once
}


@dataclass(frozen=True, slots=True)
class Fault:
    """Args:
    at_s: since the run began.
    number: of the target, where there are several.
    for_s: how long it lasts, or how long its victim stays away.
    """

    at_s: float
    kind: str
    number: int
    for_s: float


class _Kind(NamedTuple):
    """How often, and for how long: in seconds, or in leases."""

    weight: int
    low: float = 0.0
    high: float = 0.0
    is_in_leases: bool = False


_KINDS = {
    "kill worker": _Kind(6, 0.0, 0.3),
    "kill pool": _Kind(2, 0.1, 1.0),
    "kill api": _Kind(3, 0.1, 1.0),
    "kill api process": _Kind(2),
    "kill reader": _Kind(3, 2.0, 4.0),
    "kill fork server": _Kind(2),
    "pause worker": _Kind(4, 0.1, 0.8, is_in_leases=True),
    "pause worker past its lease": _Kind(4, 1.2, 2.5, is_in_leases=True),
    "pause api": _Kind(2, 0.2, 3.0),
    "pause redis": _Kind(2, 0.2, 2.0),
    "drain worker": _Kind(3, 0.0, 0.5),
    "drain pool": _Kind(2, 0.0, 0.5),
    "drain api": _Kind(2, 0.0, 0.5),
    "kill connections": _Kind(5),
    "cut worker off": _Kind(3, 1.5, 3.0, is_in_leases=True),
    "cut api off": _Kind(2, 0.2, 2.0),
    "stall worker's link": _Kind(2, 0.2, 2.0, is_in_leases=True),
    "stall api's link": _Kind(2, 0.3, 3.0),
    "lose replies to worker": _Kind(4, 0.05, 0.6),
    "lose replies to api": _Kind(4, 0.05, 0.6),
    "restart redis": _Kind(2, 0.0, 1.0),
    "kill redis": _Kind(2, 0.0, 1.0),
    "flush scripts": _Kind(1),
    "flood": _Kind(2),
}
KINDS = tuple(_KINDS)


def plan_faults(seed: int, duration_s: float, lease_s: float) -> list[Fault]:
    rng = random.Random(f"faults {seed}")
    faults: list[Fault] = []
    at_s = 1.0
    bag: list[str] = []
    while at_s < duration_s:
        if not bag:  # each kind by its weight before any comes more often
            bag = [name for name, kind in _KINDS.items() for _ in range(kind.weight)]
            rng.shuffle(bag)
        name = bag.pop()
        kind = _KINDS[name]
        for_s = rng.uniform(kind.low, kind.high) * (lease_s if kind.is_in_leases else 1.0)
        faults.append(Fault(at_s, name, rng.randrange(2), for_s))
        at_s += rng.uniform(0.3, 2.0)
    return faults


def plan_questions(seed: int, stream: str) -> Iterator[Question]:
    """Endless questions for one of the run's clients."""
    rng = random.Random(f"questions {seed} {stream}")
    number = 0
    while True:
        number += 1
        manner = rng.choices(list(MANNERS), weights=list(MANNERS.values()))[0]
        words = [f"sleep:{rng.choice((0.01, 0.02, 0.04))}", f"{stream}-{number}"]
        is_poison = manner == "stream" and rng.random() < 0.05
        if is_poison:
            words.append(POISON)
        yield Question(
            number=number,
            text=" ".join(words),
            max_tokens=rng.choice((3, 10, 30, 80)) if not is_poison else 30,
            num_frames=rng.randint(1, 6),
            clip=rng.randrange(NUM_CLIPS),
            start_s=rng.choice((0.0, 0.0, round(rng.uniform(0.0, 0.8), 3))),  # seldom read before
            manner=manner,
            has_key=manner == "retry" or rng.random() < 0.4,
            has_upload=rng.random() < 0.3,
            leaves_after=rng.randrange(12),
            api=rng.randrange(2),
        )
