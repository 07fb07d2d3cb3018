"""Sampling on the device against the sampler of the CPU, whose own tests have the slow loops."""

import pytest
import torch
from torch import Tensor

from dycoke_core.engine import sampler
from dycoke_core.engine.sampler import Draw
from dycoke_core.gpu_kernels.launch import counting_launches
from dycoke_core.gpu_kernels.rows import ROW_COLUMNS, SEAT
from dycoke_core.gpu_kernels.sampling import SamplingScratch, sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = Draw(0.0, 1.0, 0.0)
NOTHING = -7  # in outputs before the call


class Step:
    """One call for rows of seats 1, 2, ..., and what it wrote."""

    def __init__(
        self,
        logits: Tensor,
        draws: list[Draw],
        *,
        seats: list[int] | None = None,
        split: int = 64,
        capacity: int = 32,
    ) -> None:
        num_rows, vocabulary = logits.shape
        seats = seats or list(range(1, num_rows + 1))
        rows = torch.zeros(num_rows, ROW_COLUMNS, dtype=torch.int32)
        rows[:, SEAT] = torch.tensor(seats)
        settings = [
            torch.tensor([draw.temperature for draw in draws], dtype=torch.float32),
            torch.tensor([draw.top_p for draw in draws], dtype=torch.float32),
            torch.tensor([draw.uniform for draw in draws], dtype=torch.float64),
        ]
        self.last_ids = torch.full((max(seats) + 2,), NOTHING, dtype=torch.int32, device=DEVICE)
        self.ids = torch.full((num_rows,), NOTHING, dtype=torch.int32, device=DEVICE)
        self.is_finite = torch.full((num_rows,), NOTHING, dtype=torch.int32, device=DEVICE)
        scratch = SamplingScratch.allocate(
            num_rows + 1, vocabulary, DEVICE, split=split, capacity=capacity
        )
        with counting_launches() as self.launches:
            sample(
                logits.to(DEVICE),
                *(values.to(DEVICE) for values in settings),
                rows.to(DEVICE),
                self.last_ids,
                self.ids,
                self.is_finite,
                scratch,
            )


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_as_on_the_cpu(logits: Tensor, draws: list[Draw], **options: int) -> None:
    expected = sampler.sample(logits, draws)
    step = Step(logits, draws, **options)  # type: ignore[arg-type]
    assert step.ids.tolist() == expected.ids.tolist()
    assert step.is_finite.tolist() == expected.is_finite.int().tolist()
    assert step.last_ids.tolist() == [NOTHING, *expected.ids.tolist(), NOTHING]


def numbers(count: int, seed: int = 0) -> list[float]:
    return [sampler.uniform(seed, index) for index in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 63, 64, 300])
def test_greedy_rows_take_the_largest_logit(dtype: torch.dtype, vocabulary: int) -> None:
    assert_as_on_the_cpu(seeded(3, vocabulary).to(dtype), [GREEDY] * 3)


def test_equal_logits_go_to_the_lower_index() -> None:
    logits = torch.zeros(3, 300)
    logits[0, [290, 70, 71]] = 2.0
    logits[1, [63, 64]] = 2.0
    step = Step(logits, [GREEDY] * 3)
    assert step.ids.tolist() == [70, 63, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("spread", [0.5, 4.0, 30.0])
def test_drawn_rows_take_the_cpus_tokens(dtype: torch.dtype, spread: float) -> None:
    top_ps, temperatures = (0.05, 0.5, 0.9, 0.99999, 1.0), (0.3, 0.7, 1.0, 2.0)
    draws = [
        Draw(temperatures[row % 4], top_ps[row % 5], number)
        for row, number in enumerate(numbers(10))
    ]
    assert_as_on_the_cpu((spread * seeded(10, 200)).to(dtype), draws)


@pytest.mark.parametrize(("split", "capacity"), [(64, 2), (64, 16), (256, 256)])
def test_splits_and_capacity_change_no_token(split: int, capacity: int) -> None:
    logits = seeded(4, 200, seed=1)
    logits[2:] = (2 * logits[2:]).round() / 2  # many equal weights
    draws = [Draw(1.0, top_p, number) for top_p in (0.3, 0.9) for number in numbers(2)]
    assert_as_on_the_cpu(logits, draws, split=split, capacity=capacity)


def test_more_equal_weights_than_the_capacity_are_all_candidates() -> None:
    draws = [Draw(1.0, 0.4, number) for number in numbers(2)]
    logits = torch.zeros(2, 200)
    logits[:, 150:] = -1.0
    assert_as_on_the_cpu(logits, draws, capacity=8)
    logits[:, 0] = 5.0  # so that the equals are not in the first binade
    assert_as_on_the_cpu(logits, draws, capacity=8)


def test_a_nucleus_may_end_among_the_smallest_weights() -> None:
    weights = torch.cat([torch.ones(1), torch.full((250,), 2.0**-33), torch.full((9,), 2.0**-36)])
    draws = [Draw(1.0, 1 - 2.0**-24, number) for number in (0.0, 0.5, 1 - 2.0**-30)]
    draws += [Draw(1.0, 1 - 2.0**-23, 1 - 2.0**-30)]
    for capacity in (16, 512):
        assert_as_on_the_cpu(weights.log().expand(4, -1), draws, capacity=capacity)


@pytest.mark.parametrize("top_p", [1e-6, 1e-30, 1e-60])
def test_a_tiny_top_p_leaves_the_most_likely_alone(top_p: float) -> None:
    logits = seeded(4, 300)
    step = Step(logits, [Draw(2.0, top_p, number) for number in numbers(4)])
    assert step.ids.tolist() == logits.argmax(dim=-1).tolist()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # to a weight of 0
@pytest.mark.parametrize("temperature", [0.01, 1e-30, 1e-40, 1e-60])
def test_large_logits_at_a_tiny_temperature_do_not_overflow(temperature: float) -> None:
    logits = (1e30 * seeded(1, 300)).repeat(4, 1)
    logits[:, 17] = logits.max()
    draws = [Draw(temperature, top_p, number) for top_p in (0.5, 1.0) for number in (0.2, 0.8)]
    assert_as_on_the_cpu(logits, draws)


def test_the_last_candidate_is_taken_where_rounding_leaves_none() -> None:
    logits = torch.zeros(2, 300)  # weights whose sums are exact
    logits[:, 280:] = -torch.inf  # never a candidate
    logits[:, 270:280] = -30.0  # no candidate under a top_p of 0.5
    draws = [Draw(1.0, top_p, 1.0) for top_p in (0.5, 1.0)]  # as if the product were rounded up
    step = Step(logits, draws)
    assert step.ids.tolist() == [269, 279] == sampler.sample(logits, draws).ids.tolist()


@pytest.mark.parametrize("draw", [GREEDY, Draw(1.0, 0.9, 0.7), Draw(1.0, 1.0, 0.7)])
def test_rows_that_are_not_finite_are_flagged_and_the_others_sampled(draw: Draw) -> None:
    logits = seeded(6, 300)
    logits[1, 7], logits[2, 299], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, 100:] = -torch.inf
    step = Step(logits, [draw] * 6)
    assert step.is_finite.tolist() == [1, 0, 0, 0, 1, 1]
    assert_as_on_the_cpu(logits, [draw] * 6)


def test_each_rows_token_is_noted_for_its_seat_and_padding_for_none() -> None:
    logits = seeded(4, 100)
    logits[1] = torch.nan
    step = Step(logits, [GREEDY, Draw(1.0, 0.5, 0.5), GREEDY, GREEDY], seats=[5, 0, 2, 0])
    best = logits.argmax(dim=-1).tolist()
    assert step.ids.tolist() == [best[0], 0, best[2], 0]
    assert step.is_finite.tolist() == [1, 1, 1, 1]
    assert step.last_ids.tolist() == [NOTHING] * 2 + [best[2], *[NOTHING] * 2, best[0], NOTHING]


def test_logits_may_be_rows_of_a_wider_tensor() -> None:
    wide = seeded(3, 400)
    draws = [GREEDY, Draw(1.0, 0.9, 0.5), Draw(1.0, 1.0, 0.5)]
    assert_as_on_the_cpu(wide[:, :300], draws)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_a_call_is_three_launches_whatever_the_batch(num_rows: int) -> None:
    step = Step(seeded(num_rows, 300), [Draw(1.0, 0.9, 0.5)] * num_rows)
    assert sum(step.launches.values()) == 3


def test_what_does_not_fit_is_refused() -> None:
    scratch = SamplingScratch.allocate(2, 100, DEVICE, split=64)
    floats, ints = torch.zeros(2, device=DEVICE), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    rows = torch.zeros(2, ROW_COLUMNS, dtype=torch.int32, device=DEVICE)
    doubles, outputs = floats.double(), (rows, ints, ints, ints, scratch)
    with pytest.raises(ValueError, match="another vocabulary"):
        sample(torch.zeros(2, 300, device=DEVICE), floats, floats, doubles, *outputs)
    with pytest.raises(ValueError, match="uniform must be"):
        sample(torch.zeros(2, 100, device=DEVICE), floats, floats, floats, *outputs)
