"""Stage-I controls: TTM's counts without TTM's choice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dycoke_core.compression.controls import select_fewer_frames, select_random_tokens
from dycoke_core.compression.counts import count_tokens, fewer_frames
from dycoke_core.compression.randomness import random_order
from dycoke_core.compression.ttm import select_tokens
from dycoke_core.video.sampling import sample_indices
from tests.compression import slow_loops


@settings(deadline=None)
@given(
    num_frames=st.integers(1, 40),
    num_tokens=st.integers(1, 20),
    k=st.floats(0, 1),
    window=st.integers(1, 8),
    seed=st.integers(0, 2**63 - 1),
)
def test_random_tokens_have_ttms_counts_in_every_frame(
    num_frames: int, num_tokens: int, k: float, window: int, seed: int
) -> None:
    features = torch.randn(num_frames, num_tokens, 3)
    ours = select_random_tokens(features, k, window=window, seed=seed)
    theirs = select_tokens(features, k, window=window)
    count = [torch.bincount(kept // num_tokens, minlength=num_frames) for kept in (ours, theirs)]
    assert torch.equal(*count)
    assert ours.tolist() == sorted(set(ours.tolist()))


def test_random_tokens_equal_a_slow_loop() -> None:
    kept = []
    for frame in range(6):
        order = random_order(11, frame, 30, torch.device("cpu")).tolist()
        places = order if frame % 4 == 0 else order[: slow_loops.share(0.6, 30)]
        kept += sorted(frame * 30 + place for place in places)
    assert select_random_tokens(torch.zeros(6, 30, 2), 0.6, seed=11).tolist() == kept


def test_random_tokens_depend_on_the_seed_and_on_nothing_else() -> None:
    first = select_random_tokens(torch.randn(8, 49, 4), 0.7, seed=1)
    torch.manual_seed(99)
    assert torch.equal(select_random_tokens(torch.randn(8, 49, 4), 0.7, seed=1), first)
    assert not torch.equal(select_random_tokens(torch.randn(8, 49, 4), 0.7, seed=2), first)
    second_frame, third_frame = (first[(first // 49) == frame] % 49 for frame in (1, 2))
    assert not torch.equal(second_frame, third_frame), "each frame has its own draw"


@pytest.mark.parametrize(
    ("num_frames", "num_tokens", "k", "kept"),
    [(32, 196, 0.7, 15), (32, 49, 0.7, 15), (32, 196, 0.3, 25), (32, 196, 0.9, 10), (4, 9, 1, 1)],
)
def test_fewer_frames_come_closest_to_ttms_tokens(
    num_frames: int, num_tokens: int, k: float, kept: int
) -> None:
    assert len(fewer_frames(num_frames, num_tokens, k)) == kept


@settings(deadline=None)
@given(num_frames=st.integers(1, 64), num_tokens=st.integers(1, 30), k=st.floats(0, 1))
def test_fewer_frames_are_whole_and_spread_as_llava_samples(
    num_frames: int, num_tokens: int, k: float
) -> None:
    features = torch.zeros(num_frames, num_tokens, 1)
    frames = fewer_frames(num_frames, num_tokens, k)
    wanted = count_tokens(num_frames, num_tokens, k)
    assert abs(len(frames) * num_tokens - wanted) <= num_tokens / 2 or len(frames) == 1
    assert len(set(frames)) == len(frames), "no frame twice"
    slow = [frame * num_tokens + n for frame in frames for n in range(num_tokens)]
    assert select_fewer_frames(features, k).tolist() == slow
    # numpy's linspace may be slightly below a whole number; ours is exact
    differences = zip(frames, sample_indices(range(num_frames), len(frames)), strict=True)
    assert all(ours - theirs in (0, 1) for ours, theirs in differences)
    if (num_frames, num_tokens, k) == (32, 196, 0.7):
        assert frames == sample_indices(range(32), 15)
