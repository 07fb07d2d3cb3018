"""Sampling: greedy, temperature, nucleus, and numbers that depend on seed and index alone."""

import pytest
import torch

from dycoke_core.engine.sampler import draw, sample, uniform
from dycoke_core.errors import EngineError
from dycoke_core.sequence import SamplingParams


def test_temperature_zero_takes_the_largest() -> None:
    logits = torch.tensor([[0.1, 2.0, 1.9], [3.0, 2.0, 1.0]])
    assert sample(logits, [SamplingParams(), SamplingParams()], [0, 5]) == [1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_choose_nothing(bad: float) -> None:
    logits = torch.randn(2, 20)
    logits[1, 7] = bad
    with pytest.raises(EngineError):
        sample(logits, [SamplingParams(), SamplingParams(temperature=1.0)], [0, 0])


def test_a_row_is_drawn_as_if_it_were_alone() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(3))
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(4)]
    together = sample(logits, params, [9, 8, 7, 6])
    alone = [draw(logits[row], params[row], 9 - row) for row in range(4)]
    assert together == alone


def test_the_same_seed_and_index_draw_the_same_token() -> None:
    logits = torch.randn(100, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=1.0, seed=5)
    forwards = [draw(logits, params, index) for index in range(20)]
    backwards = [draw(logits, params, index) for index in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) > 5
    assert forwards != [draw(logits, SamplingParams(temperature=1.0, seed=6), i) for i in range(20)]


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    params = SamplingParams(temperature=1.0, seed=1)
    draws = [draw(probabilities.log(), params, index) for index in range(4000)]
    shares = torch.bincount(torch.tensor(draws), minlength=4) / 4000
    torch.testing.assert_close(shares, probabilities, atol=0.03, rtol=0)


def test_temperature_sharpens() -> None:
    logits = torch.tensor([1.0, 0.0])
    cold = [draw(logits, SamplingParams(temperature=0.1, seed=1), i) for i in range(200)]
    assert cold.count(0) > 195


@pytest.mark.parametrize(("top_p", "candidates"), [(0.49, {0}), (0.51, {0, 1}), (0.95, {0, 1, 2})])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(
    top_p: float, candidates: set[int]
) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).double().log()
    params = SamplingParams(temperature=1.0, top_p=top_p, seed=2)
    assert {draw(logits, params, index) for index in range(300)} == candidates


def test_random_numbers_spread_over_the_unit_interval() -> None:
    numbers = [uniform(seed, index) for seed in range(20) for index in range(50)]
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == 1000
    quarters = [sum(q / 4 <= n < (q + 1) / 4 for n in numbers) for q in range(4)]
    assert all(190 < count < 310 for count in quarters)
