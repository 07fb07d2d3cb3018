"""Policies: counts that the engine plans with, and where stage II is off."""

import pytest
import torch

from dycoke_core.compression.counts import count_visual_tokens
from dycoke_core.compression.policies import make_policy
from dycoke_core.config import POLICY_PARAMETERS, CompressionConfig


@pytest.mark.parametrize("name", POLICY_PARAMETERS)
@pytest.mark.parametrize("num_frames", [1, 2, 9, 32])
def test_every_named_policy_selects_as_many_tokens_as_it_announces(
    name: str, num_frames: int
) -> None:
    policy = make_policy(CompressionConfig(policy=name))
    kept = policy.select_visual_tokens(torch.randn(num_frames, 16, 8))
    assert len(kept) == policy.count_visual_tokens(num_frames, 16)
    assert len(kept) == count_visual_tokens(CompressionConfig(policy=name), num_frames, 16)
    assert kept.tolist() == sorted(set(kept.tolist()))
    counts = policy.count_per_frame(num_frames, 16)
    assert (counts is None) is (name == "vidcom2"), "where the features decide"
    if counts is not None:
        assert counts == tuple(torch.bincount(kept // 16, minlength=num_frames).tolist())


CHANGES: dict[str, object] = {
    **{"k": 0.31, "l": 1, "p": 0.29, "window": 8, "threshold": 0.2},
    **{"variant": "released", "seed": 9, "retained_ratio": 0.55},
}


@pytest.mark.parametrize(
    ("name", "parameter"),
    [(name, parameter) for name, taken in POLICY_PARAMETERS.items() for parameter in taken],
)
def test_a_parameter_of_stage_one_changes_its_key_and_one_of_stage_two_does_not(
    name: str, parameter: str
) -> None:
    """Equal keys share a prefix, so a key must name all that its tokens depend on."""
    before = make_policy(CompressionConfig(policy=name))
    after = make_policy(CompressionConfig.parse({"policy": name, parameter: CHANGES[parameter]}))
    of_stage_two = {"l", "p", "threshold"} | ({"seed"} if name == "random_kv" else set())
    assert (before.stage_one_key == after.stage_one_key) is (parameter in of_stage_two)
    assert before != after, "every parameter that a policy takes has an effect"


@pytest.mark.parametrize("name", ["dycoke_one_shot", "random_kv", "lowest_kv"])
def test_controls_of_stage_two_share_dycokes_stage_one(name: str) -> None:
    ours, dycoke = (make_policy(CompressionConfig(policy=policy)) for policy in (name, "dycoke"))
    assert ours.stage_one_key == dycoke.stage_one_key
    assert ours.count_decode_tokens(2960, 28) == dycoke.count_decode_tokens(2960, 28)


@pytest.mark.parametrize("name", ["random_ttm", "fewer_frames"])
def test_controls_of_stage_one_share_dycokes_stage_two(name: str) -> None:
    ours, dycoke = (make_policy(CompressionConfig(policy=policy)) for policy in (name, "dycoke"))
    assert ours.stage_one_key != dycoke.stage_one_key
    assert ours.kv_rule == dycoke.kv_rule


def test_full_tokens_never_prune() -> None:
    policy = make_policy(CompressionConfig(policy="full"))
    assert policy.stage_two(100, 6) is None
    assert policy.first_pruned_layer(100, 6) == 6
    assert policy.count_decode_tokens(100, 6) == 100


def test_dycoke_prunes_from_its_layer_on() -> None:
    policy = make_policy(CompressionConfig(l=3, p=0.7))
    stage_two = policy.stage_two(2960, 28)
    assert stage_two is not None and stage_two.num_kept == 888
    assert policy.first_pruned_layer(2960, 28) == 3
    assert policy.count_decode_tokens(2960, 28) == 888


@pytest.mark.parametrize(("num_visual", "layer"), [(0, 3), (100, 6), (100, 9)])
def test_stage_two_is_off_without_visual_tokens_or_layers(num_visual: int, layer: int) -> None:
    policy = make_policy(CompressionConfig(l=layer))
    assert policy.stage_two(num_visual, 6) is None
    assert policy.count_decode_tokens(num_visual, 6) == num_visual
