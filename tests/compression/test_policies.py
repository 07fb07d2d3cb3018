"""Policies: counts that the engine plans with, and where stage II is off."""

import pytest
import torch

from dycoke_core.compression.policies import make_policy
from dycoke_core.config import POLICY_PARAMETERS, CompressionConfig


@pytest.mark.parametrize("name", POLICY_PARAMETERS)
def test_every_named_policy_selects_as_many_tokens_as_it_announces(name: str) -> None:
    policy = make_policy(CompressionConfig(policy=name))
    kept = policy.select_visual_tokens(torch.randn(9, 16, 8))
    assert len(kept) == policy.count_visual_tokens(9, 16)


def test_full_tokens_never_prune() -> None:
    policy = make_policy(CompressionConfig(policy="full"))
    assert policy.make_pruner(100, 6) is None
    assert policy.first_pruned_layer(100, 6) == 6
    assert policy.count_decode_tokens(100, 6) == 100


def test_dycoke_prunes_from_its_layer_on() -> None:
    policy = make_policy(CompressionConfig(l=3, p=0.7))
    pruner = policy.make_pruner(2960, 28)
    assert pruner is not None and pruner.num_kept == 888
    assert policy.first_pruned_layer(2960, 28) == 3
    assert policy.count_decode_tokens(2960, 28) == 888


def test_a_share_of_a_round_number_is_not_one_short() -> None:
    policy = make_policy(CompressionConfig(p=0.9))
    assert policy.count_decode_tokens(2960, 28) == 296


@pytest.mark.parametrize(("num_visual", "layer"), [(0, 3), (100, 6), (100, 9)])
def test_stage_two_is_off_without_visual_tokens_or_layers(num_visual: int, layer: int) -> None:
    policy = make_policy(CompressionConfig(l=layer))
    assert policy.make_pruner(num_visual, 6) is None
    assert policy.count_decode_tokens(num_visual, 6) == num_visual
