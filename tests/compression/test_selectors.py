"""Stage I behind its interface: the announced counts are selected, and keys differ where results
do."""

from itertools import combinations

import pytest
import torch

from dycoke_core.compression.selectors import (
    AllTokens,
    FewerFrames,
    RandomTokens,
    Selector,
    TemporalMerging,
    VidCom2,
)

SELECTORS: tuple[Selector, ...] = (
    AllTokens(),
    TemporalMerging(0.7, 4, "paper"),
    TemporalMerging(0.7, 4, "released"),
    TemporalMerging(0.5, 4, "paper"),
    TemporalMerging(0.7, 2, "paper"),
    RandomTokens(0.7, 4, 0),
    RandomTokens(0.7, 4, 1),
    FewerFrames(0.7, 4),
    FewerFrames(0.5, 4),
    VidCom2(0.25),
    VidCom2(0.5),
)


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda selector: str(selector.key))
@pytest.mark.parametrize("num_frames", [5, 8, 13])
def test_as_many_tokens_stay_as_were_announced(selector: Selector, num_frames: int) -> None:
    features = torch.randn(num_frames, 12, 8, generator=torch.Generator().manual_seed(num_frames))
    kept = selector.select(features)
    assert len(kept) == selector.count(num_frames, 12)
    places = kept.tolist()
    assert len(set(places)) == len(places) and set(places) <= set(range(num_frames * 12))
    assert places == sorted(places) or "released" in selector.key, "the released code's own order"
    per_frame = selector.count_per_frame(num_frames, 12)
    if per_frame is not None:
        assert torch.bincount(kept // 12, minlength=num_frames).tolist() == list(per_frame)


def test_what_selects_otherwise_has_another_key() -> None:
    for one, other in combinations(SELECTORS, 2):
        assert one.key != other.key


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda selector: str(selector.key))
def test_the_same_video_keeps_the_same_tokens(selector: Selector) -> None:
    features = torch.randn(9, 12, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(selector.select(features), selector.select(features.clone()))


def test_all_tokens_are_all_tokens() -> None:
    assert AllTokens().select(torch.zeros(2, 3, 4)).tolist() == [0, 1, 2, 3, 4, 5]


def test_fewer_frames_keeps_whole_ones() -> None:
    selector = FewerFrames(0.7, 4)
    per_frame = selector.count_per_frame(16, 12)
    assert set(per_frame) == {0, 12} and per_frame[0] == 12
    assert selector.count(16, 12) == sum(per_frame)


def test_random_tokens_are_as_many_as_merging_keeps() -> None:
    merging, random = TemporalMerging(0.7, 4, "paper"), RandomTokens(0.7, 4, 0)
    assert random.count_per_frame(13, 12) == merging.count_per_frame(13, 12)
