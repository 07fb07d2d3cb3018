"""What clients do, drawn from a seed, against a service that answers by the script."""

import random
from collections import Counter

import pytest

from loadtest.scenarios import MIX, Draw


def test_same_seed_asks_the_same_of_both_settings() -> None:
    first, second = (
        [Draw.of(chance) for _ in range(50)] for chance in (random.Random(7), random.Random(7))
    )
    assert first == second
    assert len({draw.tag for draw in first}) == 50, "each new video is new"


def test_scenarios_come_in_the_proportions_of_the_mix() -> None:
    chance = random.Random(1)
    counts = Counter(Draw.of(chance).scenario for _ in range(14_000))
    for name, weight in MIX.items():
        assert counts[name] == pytest.approx(1000 * weight, rel=0.15)
