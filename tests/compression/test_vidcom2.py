"""VidCom2 against a slow loop, and what it promises about budgets."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dycoke_core.compression.vidcom2 import count_tokens, frame_budgets, select_tokens
from tests.compression import slow_loops

RATIOS = st.one_of(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), st.floats(0, 1))


@settings(deadline=None, max_examples=60)
@given(
    num_frames=st.integers(1, 12),
    num_tokens=st.integers(1, 12),
    num_channels=st.integers(4, 9),  # with one quiet channel all tokens would tie
    ratio=RATIOS,
    likeness=st.sampled_from(["random", "nearly identical", "zero"]),
    seed=st.integers(0, 2**16),
)
def test_selection_equals_the_slow_loop(
    num_frames: int, num_tokens: int, num_channels: int, ratio: float, likeness: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_frames, num_tokens, num_channels, generator=generator)
    if likeness == "nearly identical":
        features = features[:1] + 1e-3 * features
    if likeness == "zero":
        features.zero_()
    kept = select_tokens(features, ratio)
    assert kept.tolist() == slow_loops.vidcom2(features, ratio)
    assert len(kept) == count_tokens(num_frames, num_tokens, ratio)
    assert kept.tolist() == sorted(set(kept.tolist()))


@given(
    uniqueness=st.lists(st.floats(-5, 0), min_size=1, max_size=40),
    num_tokens=st.integers(1, 200),
    ratio=RATIOS,
)
def test_budgets_add_up_and_fit_into_frames(
    uniqueness: list[float], num_tokens: int, ratio: float
) -> None:
    num_kept = count_tokens(len(uniqueness), num_tokens, ratio)
    budgets = frame_budgets(uniqueness, num_tokens, ratio, num_kept)
    assert sum(budgets) == num_kept
    assert all(0 <= budget <= num_tokens for budget in budgets)
    assert budgets == slow_loops.vidcom2_budgets(uniqueness, num_tokens, ratio)
    by_uniqueness = sorted(zip(uniqueness, budgets, strict=True))
    steps = pairwise(by_uniqueness)
    assert all(more[1] >= less[1] - 1 for less, more in steps), "never less to the more unique"


def test_a_frame_that_stands_out_keeps_more() -> None:
    features = torch.randn(1, 20, 16).repeat(8, 1, 1)
    features[5] = torch.randn(20, 16)
    counts = torch.bincount(select_tokens(features, 0.25) // 20, minlength=8)
    assert counts[5] == counts.max() and (counts[5] > counts[torch.arange(8) != 5]).all()


def test_a_token_that_stands_out_survives() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.ones(6, 30, 8) + 0.01 * torch.randn(6, 30, 8, generator=generator)
    features[3, 17] = -1.0
    assert 3 * 30 + 17 in select_tokens(features, 0.1).tolist()


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        select_tokens(torch.zeros(4, 4, 8), ratio)


@pytest.mark.parametrize("shape", [(0, 4, 8), (4, 8)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        select_tokens(torch.zeros(shape), 0.5)
