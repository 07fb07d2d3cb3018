"""Sampling: the definition against slow loops, and numbers that depend on seed and index alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dycoke_core.engine import sampler
from dycoke_core.engine.sampler import Draw, sample, uniform
from dycoke_core.sequence import SamplingParams
from tests.engine import slow_sampler
from tests.operations import CountingOperations

GREEDY = Draw(0.0, 1.0, 0.0)
PROBABILITIES = torch.tensor([0.15, 0.5, 0.05, 0.3])


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def answer(logits: Tensor, params: SamplingParams, indices: range) -> list[int]:
    """What one row draws at each index of an answer."""
    draws = [Draw.of_token(params, index) for index in indices]
    sampled = sample(logits.expand(len(draws), -1), draws)
    assert sampled.is_finite.all()
    return sampled.ids.tolist()


# --- greedy ---


def test_temperature_zero_takes_the_largest() -> None:
    logits = torch.tensor([[0.1, 2.0, 1.9], [3.0, 2.0, 1.0]])
    assert sample(logits, [GREEDY, GREEDY]).ids.tolist() == [1, 0]


def test_temperature_zero_takes_the_lowest_index_of_equals() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, [4099, 77, 4998]] = 3.0
    assert sample(logits, [GREEDY]).ids.tolist() == [77]


def test_a_temperature_that_float32_rounds_to_zero_is_greedy() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0]])
    assert sample(logits, [Draw(1e-60, 1.0, 0.99)]).ids.tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_each_dtype_are_taken(dtype: torch.dtype) -> None:
    logits = seeded(2, 100).to(dtype)
    sampled = sample(logits, [GREEDY, Draw(1.0, 0.9, 0.5)])
    assert sampled.ids.dtype == torch.int64 and sampled.is_finite.dtype == torch.bool
    assert torch.equal(sampled.ids, sample(logits.float(), [GREEDY, Draw(1.0, 0.9, 0.5)]).ids)


# --- what is not finite ---


@pytest.mark.parametrize("draw", [GREEDY, Draw(1.0, 0.9, 0.7)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_flagged_and_the_others_are_sampled(
    bad: float, draw: Draw
) -> None:
    logits = seeded(3, 20)
    alone = sample(logits, [draw, draw, draw])
    logits[1, 7] = bad
    sampled = sample(logits, [draw, draw, draw])
    assert sampled.is_finite.tolist() == [True, False, True]
    assert sampled.ids[1] == 0
    assert torch.equal(sampled.ids[[0, 2]], alone.ids[[0, 2]])


@pytest.mark.parametrize("draw", [GREEDY, Draw(1.0, 0.9, 0.7), Draw(1.0, 1.0, 0.7)])
def test_a_row_of_minus_infinities_is_flagged(draw: Draw) -> None:
    sampled = sample(torch.full((1, 20), -torch.inf), [draw])
    assert sampled.is_finite.tolist() == [False] and sampled.ids.tolist() == [0]


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_a_token_at_minus_infinity_is_never_drawn(top_p: float) -> None:
    logits = torch.zeros(1, 6)
    logits[0, [0, 3, 5]] = -torch.inf
    numbers = [0.0, 0.3, 0.5, 0.9, 1.0 - 2.0**-53]
    sampled = sample(logits.expand(5, -1), [Draw(1.0, top_p, number) for number in numbers])
    assert sampled.ids.tolist() == [1, 1, 2, 4, 4]
    assert sampled.is_finite.all()


# --- the definition ---


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    vocabulary=st.integers(1, 60),
    spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    step=st.sampled_from([0.0, 0.5, 4.0]),  # above 0: many equal weights
    temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([1e-9, 0.3, 0.49, 0.9, 0.999999, 1.0]),
    number=st.floats(0, 1, exclude_max=True),
)
def test_a_row_is_sampled_as_in_the_slow_loop(
    seed: int,
    vocabulary: int,
    spread: float,
    step: float,
    temperature: float,
    top_p: float,
    number: float,
) -> None:
    logits = spread * seeded(1, vocabulary, seed=seed)
    if step:
        logits = (logits / step).round() * step
    draw = Draw(temperature, top_p, number)
    assert sample(logits, [draw]).ids.tolist() == [slow_sampler.sample(logits[0], draw)]


@pytest.mark.parametrize(
    ("top_p", "candidates"), [(0.49, {1}), (0.51, {1, 3}), (0.81, {0, 1, 3}), (0.96, {0, 1, 2, 3})]
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(
    top_p: float, candidates: set[int]
) -> None:
    params = SamplingParams(temperature=1.0, top_p=top_p, seed=2)
    assert set(answer(PROBABILITIES.log(), params, range(300))) == candidates
    assert set(slow_sampler.nucleus(PROBABILITIES.log(), 1.0, top_p)) == candidates


def test_ties_at_the_threshold_are_all_candidates() -> None:
    logits = torch.tensor([0.0, 1.0, 0.0, 0.0, -5.0])
    params = SamplingParams(temperature=1.0, top_p=0.6, seed=4)
    assert set(answer(logits, params, range(300))) == {0, 1, 2, 3}


def test_a_tiny_top_p_leaves_the_most_likely_alone() -> None:
    logits = seeded(1, 3000)
    numbers = [i / 50 for i in range(50)]
    for top_p in (1e-4, 1e-30, 1e-60):
        sampled = sample(logits.expand(50, -1), [Draw(2.0, top_p, number) for number in numbers])
        assert set(sampled.ids.tolist()) == {int(logits.argmax())}


def test_a_top_p_just_below_one_leaves_out_the_least_likely_alone() -> None:
    weights = torch.tensor([1.0, 2.0**-10, 2.0**-28])
    params = SamplingParams(temperature=1.0, top_p=1 - 2.0**-20, seed=1)
    assert slow_sampler.nucleus(weights.log(), 1.0, params.top_p) == [0, 1]
    last = sample(weights.log()[None], [Draw(1.0, params.top_p, 1 - 2.0**-53)])
    assert last.ids.tolist() == [1]


def test_candidates_are_drawn_in_the_order_of_the_vocabulary() -> None:
    numbers = [0.0, 0.14, 0.16, 0.64, 0.66, 0.69, 0.71, 1.0 - 2.0**-53]
    logits = PROBABILITIES.log().expand(len(numbers), -1)
    sampled = sample(logits, [Draw(1.0, 1.0, number) for number in numbers])
    assert sampled.ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_draws_follow_the_distribution() -> None:
    params = SamplingParams(temperature=1.0, seed=1)
    draws = answer(PROBABILITIES.log(), params, range(4000))
    shares = torch.bincount(torch.tensor(draws), minlength=4) / 4000
    torch.testing.assert_close(shares, PROBABILITIES, atol=0.03, rtol=0)


def test_draws_of_a_nucleus_follow_the_distribution_within_it() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.75, seed=1)
    draws = answer(PROBABILITIES.log(), params, range(4000))
    shares = torch.bincount(torch.tensor(draws), minlength=4) / 4000
    expected = torch.tensor([0, 0.5, 0, 0.3]) / 0.8
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)


def test_temperature_sharpens() -> None:
    params = SamplingParams(temperature=0.1, seed=1)
    assert answer(torch.tensor([1.0, 0.0]), params, range(200)).count(0) > 195


@pytest.mark.parametrize("temperature", [0.01, 1e-30, 1e-40])
def test_large_logits_at_a_tiny_temperature_do_not_overflow(temperature: float) -> None:
    logits = 1e30 * seeded(1, 5000)
    logits[0, 17] = logits.max()  # the largest twice: each is drawn
    pair = sorted([17, int(logits[0, 18:].argmax()) + 18])
    draws = [Draw(temperature, top_p, number) for top_p in (0.5, 1.0) for number in (0.2, 0.8)]
    sampled = sample(logits.expand(4, -1), draws)
    assert sampled.ids.tolist() == pair * 2 and sampled.is_finite.all()


def test_a_vocabulary_of_152_thousand_is_sampled_as_in_the_slow_loop() -> None:
    logits = 3 * seeded(3, 152_064)
    draws = [Draw(0.7, 0.9, 0.3), GREEDY, Draw(1.5, 0.99, 0.8)]
    expected = [slow_sampler.sample(row, draw) for row, draw in zip(logits, draws, strict=True)]
    assert sample(logits, draws).ids.tolist() == expected


# --- rows ---


def test_a_row_is_drawn_as_if_it_were_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = 2 * seeded(7, 300, seed=3)
    draws = [Draw(0.5 * (row % 3), (0.5, 0.9, 1.0)[row // 3], uniform(row, 9)) for row in range(7)]
    together = sample(logits, draws)
    alone = [int(sample(logits[row : row + 1], [draws[row]]).ids) for row in range(7)]
    assert together.ids.tolist() == alone
    monkeypatch.setattr(sampler, "BLOCK_LOGITS", 900)
    assert torch.equal(sample(logits, draws).ids, together.ids)


def test_the_operations_do_not_grow_with_the_rows_and_none_waits_for_the_device() -> None:
    counts = []
    for num_rows in (1, 6):
        with CountingOperations() as operations:
            sample(seeded(num_rows, 300), [Draw(1.0, 0.9, 0.5)] * num_rows)
        assert not operations.waiting
        counts.append(operations.counts)
    assert counts[0] == counts[1]


def test_greedy_rows_cost_no_draw() -> None:
    with CountingOperations() as operations:
        sample(seeded(6, 300), [GREEDY] * 6)
    assert "exp" not in operations.counts and "cumsum" not in operations.counts


def test_no_rows_sample_nothing() -> None:
    assert len(sample(torch.zeros(0, 9), []).ids) == 0


# --- random numbers ---


def test_the_same_seed_and_index_draw_the_same_token() -> None:
    logits = seeded(100)
    params = SamplingParams(temperature=1.0, seed=5)
    forwards = answer(logits, params, range(20))
    assert forwards == answer(logits, params, range(19, -1, -1))[::-1]
    assert forwards[7:] == answer(logits, params, range(7, 20))
    assert len(set(forwards)) > 5
    assert forwards != answer(logits, SamplingParams(temperature=1.0, seed=6), range(20))


def test_random_numbers_spread_over_the_unit_interval() -> None:
    numbers = [uniform(seed, index) for seed in range(20) for index in range(50)]
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == 1000
    quarters = [sum(q / 4 <= n < (q + 1) / 4 for n in numbers) for q in range(4)]
    assert all(190 < count < 310 for count in quarters)
