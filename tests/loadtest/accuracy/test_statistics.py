"""Intervals and tests of paired scores."""

import math

import numpy as np
import pytest

from loadtest.accuracy.statistics import Estimate, Paired, exact_difference, mcnemar


def test_mcnemar_is_the_exact_binomial_test() -> None:
    ours = np.array([1.0] * 10 + [0.0] * 2 + [1.0] * 50)
    theirs = np.array([0.0] * 10 + [1.0] * 2 + [1.0] * 50)
    result = mcnemar(ours, theirs)
    expected = 2 * sum(math.comb(12, i) for i in range(3)) / 2**12
    assert (result.only_ours, result.only_theirs) == (10, 2)
    assert result.p == pytest.approx(expected)
    assert mcnemar(theirs, ours).p == pytest.approx(expected)


@pytest.mark.parametrize("num_differing", [0, 2, 4000])
def test_mcnemar_sees_nothing_in_an_even_split(num_differing: int) -> None:
    ours = np.tile([0.0, 1.0], num_differing // 2 + 1)[:num_differing]
    assert mcnemar(ours, 1 - ours).p == pytest.approx(1.0)


def paired_world(num_videos: int, copies: int = 1) -> tuple[Paired, np.ndarray, np.ndarray]:
    """Two families with `copies` questions each per video; scores depend on the video alone."""
    rng = np.random.default_rng(1)
    videos = np.repeat(np.arange(num_videos), 2 * copies)
    families = np.tile(np.repeat([0, 1], copies), num_videos)
    ours = np.repeat(rng.integers(0, 2, num_videos).astype(float), 2 * copies)
    theirs = np.repeat(rng.integers(0, 2, num_videos).astype(float), 2 * copies)
    return Paired(videos, families, 2), ours, theirs


def test_a_setting_against_itself_differs_by_exactly_nothing() -> None:
    paired, ours, _ = paired_world(40)
    assert paired.difference(ours, ours, (0, 1)) == Estimate(0.0, 0.0, 0.0)


def test_an_interval_is_about_as_wide_as_theory_says() -> None:
    paired, ours, _ = paired_world(400)
    estimate = paired.mean(ours, (0, 1))
    assert estimate.value == ours.mean()
    width = 2 * 1.96 * (ours.mean() * (1 - ours.mean()) / 400) ** 0.5
    assert estimate.high - estimate.low == pytest.approx(width, rel=0.1)


def test_more_questions_about_the_same_videos_make_no_interval_narrower() -> None:
    few, many = paired_world(60), paired_world(60, copies=10)
    one = few[0].difference(few[1], few[2], (0, 1))
    ten = many[0].difference(many[1], many[2], (0, 1))
    assert (one.value, one.low, one.high) == pytest.approx((ten.value, ten.low, ten.high))


def test_families_weigh_the_same_however_many_questions_they_have() -> None:
    videos = np.arange(30)
    families = np.array([0] * 20 + [1] * 10)
    scores = np.array([1.0] * 20 + [0.0] * 10)
    assert Paired(videos, families, 2).mean(scores, (0, 1)).value == 0.5
    assert Paired(videos, families, 2).mean(scores, (0,)).value == 1.0


def test_what_both_settings_share_cancels_in_a_difference() -> None:
    """Paired: hard videos are hard for both."""
    paired, ours, _ = paired_world(100)
    theirs = ours.copy()
    theirs[:2] = 1 - theirs[:2]
    difference = paired.difference(ours, theirs, (0, 1))
    alone = paired.mean(ours, (0, 1))
    assert difference.high - difference.low < (alone.high - alone.low) / 3


def test_exact_interval_is_clopper_and_pearsons() -> None:
    """100 questions: none, or some, that only one setting answers right."""
    equal, better = np.ones(100), np.concatenate([np.ones(90), np.zeros(10)])
    same = exact_difference(equal, equal)
    assert (same.value, same.high) == (0.0, -same.low)
    assert same.high == pytest.approx(1 - 0.0125 ** (1 / 100), abs=1e-6)
    worse = exact_difference(better, equal)
    assert worse.value == pytest.approx(-0.1)
    # Quantiles of beta(10, 91) at 0.0125 and beta(11, 90) at 0.9875, by numerical integration.
    assert worse.low == pytest.approx(-0.18777, abs=1e-5)
    assert worse.high == pytest.approx(same.high - 0.04384, abs=1e-5)
