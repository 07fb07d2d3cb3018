"""Stage I against the paper's counts and a slow loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dycoke_core.compression import ttm
from dycoke_core.compression.counts import count_per_frame, count_tokens, reference_frames
from dycoke_core.compression.ttm import select_tokens
from dycoke_core.config import TtmVariant
from tests.compression import slow_loops
from tests.operations import CountingOperations

SHARES = st.one_of(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]), st.floats(0, 1))


@pytest.mark.parametrize(("k", "kept"), [(0.3, 4856), (0.5, 3920), (0.7, 2960), (0.9, 2024)])
def test_the_paper_setting_keeps_the_documented_counts(k: float, kept: int) -> None:
    features = torch.randn(32, 196, 8)
    assert len(select_tokens(features, k)) == kept == count_tokens(32, 196, k)


def test_the_released_variant_keeps_the_third_frame_of_the_last_window() -> None:
    features = torch.randn(32, 196, 8, generator=torch.Generator().manual_seed(0))
    kept = select_tokens(features, 0.7, variant="released")
    assert len(kept) == 3098 == count_tokens(32, 196, 0.7, variant="released")
    counts = torch.bincount(kept // 196, minlength=32).tolist()
    assert counts == [196, 58, 58, 58] * 7 + [196, 58, 196, 58]


def test_the_released_variant_orders_survivors_by_change() -> None:
    features = torch.randn(8, 30, 16, generator=torch.Generator().manual_seed(1))
    kept = select_tokens(features, 0.5, variant="released").tolist()
    second_frame = [index - 30 for index in kept if 30 <= index < 60]
    changes = [slow_loops.distance(features[1, n], features[0, n]) for n in second_frame]
    assert changes == sorted(changes, reverse=True)
    assert second_frame != sorted(second_frame)


def test_the_released_variant_drops_the_last_of_an_odd_number_of_frames() -> None:
    references = reference_frames(7, variant="released")
    assert references == {0: None, 1: 0, 2: 0, 3: 2, 4: None, 5: 4}


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4])
def test_the_released_variant_refuses_what_crashes_the_released_code(num_frames: int) -> None:
    with pytest.raises(ValueError, match="at least 5 frames"):
        select_tokens(torch.randn(num_frames, 4, 8), 0.7, variant="released")


@settings(deadline=None, max_examples=60)
@given(
    num_frames=st.integers(1, 40),
    num_tokens=st.integers(1, 12),
    k=SHARES,
    likeness=st.sampled_from(["random", "identical", "nearly identical", "zero"]),
    seed=st.integers(0, 2**16),
)
def test_selection_equals_the_slow_loop(
    num_frames: int, num_tokens: int, k: float, likeness: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_frames, num_tokens, 6, generator=generator)
    if likeness != "random":
        features = features[:1].repeat(num_frames, 1, 1)
    if likeness == "nearly identical":
        features += 1e-3 * torch.randn(features.shape, generator=generator)
    if likeness == "zero":
        features.zero_()
    kept = select_tokens(features, k)

    assert kept.tolist() == slow_loops.ttm(features, k)
    assert len(kept) == count_tokens(num_frames, num_tokens, k)
    assert torch.equal(kept, kept.sort().values)
    assert torch.equal(kept, select_tokens(features, k))
    counts = torch.bincount(kept // num_tokens, minlength=num_frames)
    assert (counts[::4] == num_tokens).all(), "frame 0 of each window stays whole"
    pruned = [frame for frame in range(num_frames) if frame % 4]
    assert (counts[pruned] == slow_loops.share(k, num_tokens)).all()


@settings(deadline=None, max_examples=200)
@given(
    num_frames=st.integers(1, 9),
    num_tokens=st.integers(1, 12),
    window=st.integers(1, 5),
    variant=st.sampled_from(["paper", "released"]),
    k=SHARES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    noise=st.sampled_from([0.0, 1e-7, 1e-3, 1.0]),  # 0: all frames are the same
    block=st.sampled_from([1, 100, 2**20]),
    seed=st.integers(0, 2**16),
)
def test_selection_equals_that_of_one_frame_after_the_other(
    num_frames: int,
    num_tokens: int,
    window: int,
    variant: TtmVariant,
    k: float,
    dtype: torch.dtype,
    noise: float,
    block: int,
    seed: int,
) -> None:
    if variant == "released":
        num_frames, window = max(num_frames, 5), 4
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(1, num_tokens, 17, generator=generator)
    moving = torch.randn(num_frames, num_tokens, 17, generator=generator)
    features = (still + noise * moving).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ttm, "_BLOCK_VALUES_ON_CPU", block)
        kept = select_tokens(features, k, window=window, variant=variant)
    assert kept.tolist() == slow_loops.ttm_by_frames(features, k, window, variant)
    counts = count_per_frame(num_frames, num_tokens, k, window=window, variant=variant)
    assert counts == tuple(torch.bincount(kept // num_tokens, minlength=num_frames).tolist())


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_operations_do_not_grow_with_the_frames_and_none_waits_for_the_device(
    variant: TtmVariant,
) -> None:
    counts = []
    for num_frames in (8, 32):
        with CountingOperations() as operations:
            select_tokens(torch.randn(num_frames, 9, 6), 0.7, variant=variant)
        assert not operations.waiting
        counts.append(operations.counts)
    assert counts[0] == counts[1]


@settings(deadline=None, max_examples=30)
@given(num_frames=st.integers(1, 40), k=SHARES)
def test_bfloat16_frames_that_hardly_differ_rank_as_in_the_slow_loop(
    num_frames: int, k: float
) -> None:
    generator = torch.Generator().manual_seed(num_frames)
    first = torch.randn(1, 49, 64, generator=generator)
    features = first + 0.01 * torch.randn(num_frames, 49, 64, generator=generator)
    features = features.bfloat16()
    assert select_tokens(features, k).tolist() == slow_loops.ttm(features, k)


def test_a_changed_token_survives_in_every_frame_that_changes() -> None:
    features = torch.randn(1, 10, 8).repeat(4, 1, 1)
    features[2, 7] += 1.0
    kept = select_tokens(features, 0.9)
    assert kept.tolist() == [*range(10), 10, 27, 37]


@pytest.mark.parametrize("shape", [(0, 4, 8), (4, 8)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        select_tokens(torch.zeros(shape), 0.7)


@pytest.mark.parametrize("k", [-0.1, 1.1, float("nan")])
def test_a_share_outside_its_range_is_refused(k: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        select_tokens(torch.zeros(4, 4, 8), k)


def test_a_window_of_one_keeps_everything() -> None:
    assert len(select_tokens(torch.randn(9, 5, 8), 0.9, window=1)) == 45
