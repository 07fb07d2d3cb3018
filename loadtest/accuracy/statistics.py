"""Paired statistics: every setting answers the same questions about the same videos.

Questions about one video tend to be right or wrong together, so intervals come from resampling
videos, not questions. McNemar's test, which assumes independent questions, is reported as well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 4000

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


class Paired:
    """Scores of several settings over the same questions.

    Args:
        videos, families: int64 [questions], each question's.
        num_families: families are 0 … num_families - 1.
        seed: of the resampling.
    """

    def __init__(self, videos: Ints, families: Ints, num_families: int, *, seed: int = 0) -> None:
        _, self._videos = np.unique(videos, return_inverse=True)
        self._families = families
        self._num_families = num_families
        num_videos = int(self._videos.max()) + 1
        draws = np.random.default_rng(seed).integers(0, num_videos, (NUM_RESAMPLES, num_videos))
        self._weights = np.stack([np.bincount(draw, minlength=num_videos) for draw in draws])
        self._counts = self._sum_by_video(np.ones(len(families)))

    def mean(self, scores: Floats, families: Sequence[int]) -> Estimate:
        """The mean over families of the families' means."""
        return self._estimate(scores, families)

    def difference(self, ours: Floats, theirs: Floats, families: Sequence[int]) -> Estimate:
        """The difference of two settings' `mean`, with the same resamples for both."""
        return self._estimate(ours - theirs, families)

    def _estimate(self, scores: Floats, families: Sequence[int]) -> Estimate:
        sums = self._sum_by_video(scores)[:, families]
        counts = self._counts[:, families]
        value = (sums.sum(axis=0) / counts.sum(axis=0)).mean()
        totals = self._weights @ counts  # [resamples, families]
        is_whole = (totals > 0).all(axis=1)  # a resample may lack every video of a small family
        resampled = ((self._weights[is_whole] @ sums) / totals[is_whole]).mean(axis=1)
        low, high = np.quantile(resampled, (0.025, 0.975))
        return Estimate(float(value), float(low), float(high))

    def _sum_by_video(self, values: Floats) -> Floats:
        """float64 [videos, families]."""
        table = np.zeros((int(self._videos.max()) + 1, self._num_families))
        np.add.at(table, (self._videos, self._families), values)
        return table


@dataclass(frozen=True, slots=True)
class McNemar:
    """Questions that only one setting gets right, and the exact two-sided p of such a split."""

    only_ours: int
    only_theirs: int
    p: float


def mcnemar(ours: Floats, theirs: Floats) -> McNemar:
    """Compares right and wrong answers, scores of 0 and 1.

    Source: McNemar's exact test: without a difference the split of the questions that differ is
        binomial with p = 1/2.
    """
    b, c = int((ours > theirs).sum()), int((theirs > ours).sum())
    n, fewer = b + c, min(b, c)
    tail = sum(math.exp(_log_choose(n, i) - n * math.log(2)) for i in range(fewer + 1))
    return McNemar(b, c, min(1.0, 2 * tail) if n else 1.0)


def exact_difference(ours: Floats, theirs: Floats) -> Estimate:
    """The difference of two shares of right answers to the same questions, scores of 0 and 1, with
    an interval that holds 95 % of the time or more, however few questions differ. (Resampling says
    0 to 0 where none does.)

    Source: Clopper and Pearson's exact limits (Biometrika 26, 1934) for the share of questions that
        only ours has right, less those for the share that only theirs has; 1.25 % each.
    """
    n = len(ours)
    only_ours, only_theirs = int((ours > theirs).sum()), int((theirs > ours).sum())
    tail = 0.0125
    low = _lower_limit(only_ours, n, tail) - _upper_limit(only_theirs, n, tail)
    high = _upper_limit(only_ours, n, tail) - _lower_limit(only_theirs, n, tail)
    return Estimate((only_ours - only_theirs) / n, low, high)


def _upper_limit(successes: int, n: int, tail: float) -> float:
    """The largest probability of success at which so few are not rarer than `tail`."""
    low, high = successes / n, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        is_too_rare = _binomial_cdf(successes, n, middle) < tail
        low, high = (low, middle) if is_too_rare else (middle, high)
    return high


def _lower_limit(successes: int, n: int, tail: float) -> float:
    return 1.0 - _upper_limit(n - successes, n, tail)


def _binomial_cdf(k: int, n: int, p: float) -> float:
    if k >= n or p <= 0.0:
        return 1.0
    if p >= 1.0:
        return 0.0
    logs = (_log_choose(n, i) + i * math.log(p) + (n - i) * math.log1p(-p) for i in range(k + 1))
    return math.fsum(map(math.exp, logs))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
