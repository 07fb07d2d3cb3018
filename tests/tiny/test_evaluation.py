"""Figures of an evaluation: means by family and policy, and intervals of shares."""

import pytest

from dycoke_core.tiny.evaluation import (
    Answer,
    accuracies,
    mean_of_short_families,
    wilson_interval,
)
from dycoke_core.tiny.questions import SHORT_FAMILIES


def answer(family: str, score: float, policy: int = 0) -> Answer:
    return Answer(seed=1, family=family, policy=policy, text="", score=score)


def test_scores_are_averaged_by_family_under_one_policy() -> None:
    found = [
        answer("color", 1.0),
        answer("color", 0.0),
        answer("color", 0.0, policy=1),
        answer("count", 0.25),
    ]
    assert accuracies(found, 0) == {"color": 0.5, "count": 0.25}
    assert accuracies(found, 1) == {"color": 0.0}
    assert accuracies(found, 2) == {}


def test_the_mean_of_short_families_leaves_descriptions_out() -> None:
    by_family = dict.fromkeys(SHORT_FAMILIES, 0.5) | {"describe": 0.0}
    assert mean_of_short_families(by_family) == pytest.approx(0.5)
    by_family[SHORT_FAMILIES[0]] = 1.0
    assert mean_of_short_families(by_family) == pytest.approx(0.5 + 0.5 / len(SHORT_FAMILIES))


@pytest.mark.parametrize(
    ("mean", "number", "low", "high"),
    [  # of Wilson's formula, with z = 1.96
        (0.5, 100, 0.4038, 0.5962),
        (0.0, 10, 0.0, 0.2775),
        (1.0, 10, 0.7225, 1.0),
        (0.9, 40, 0.7695, 0.9604),
    ],
)
def test_an_interval_is_wilsons(mean: float, number: int, low: float, high: float) -> None:
    found = wilson_interval(mean, number)
    assert found == pytest.approx((low, high), abs=2e-4)


def test_more_trials_make_a_narrower_interval_within_0_and_1() -> None:
    widths = []
    for number in (1, 10, 100, 1000):
        low, high = wilson_interval(0.97, number)
        assert -1e-12 <= low <= 0.97 <= high <= 1 + 1e-12
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)
