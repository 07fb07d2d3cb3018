"""Compression policies: what a sequence's visual tokens go through, behind one small interface.

`dycoke_core.config.POLICY_PARAMETERS` names the policies and their parameters without torch; this
module holds what they do. A baseline joins with a class and a line in `_POLICIES`.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from dycoke_core.compression import ttm
from dycoke_core.compression.counts import share_of
from dycoke_core.compression.kv_pruning import KVPruner
from dycoke_core.config import CompressionConfig


class Policy(Protocol):
    """What the engine asks of a policy. Stateless; a sequence's state is its `KVPruner`."""

    @property
    def stage_one_key(self) -> tuple[object, ...]:
        """Everything that the choice of `select_visual_tokens` depends on, besides the features."""
        ...

    def count_visual_tokens(self, num_frames: int, tokens_per_frame: int) -> int:
        """V, known before encoding."""
        ...

    def select_visual_tokens(self, features: Tensor) -> Tensor:
        """Stage I: int64 [V] places among the F * N tokens of features [F, N, D]."""
        ...

    def count_decode_tokens(self, num_visual_tokens: int, num_layers: int) -> int:
        """n_keep: visual tokens that a pruned layer attends to in a decode step."""
        ...

    def first_pruned_layer(self, num_visual_tokens: int, num_layers: int) -> int:
        """The layer from which decode steps attend to the kept set; num_layers: stage II is off."""
        ...

    def make_pruner(self, num_visual_tokens: int, num_layers: int) -> KVPruner | None:
        """A sequence's stage-II state, None where stage II is off."""
        ...


class FullTokens:
    """Every visual token, in every layer."""

    def __init__(self, config: CompressionConfig) -> None:
        pass

    @property
    def stage_one_key(self) -> tuple[object, ...]:
        return ("full",)

    def count_visual_tokens(self, num_frames: int, tokens_per_frame: int) -> int:
        return num_frames * tokens_per_frame

    def select_visual_tokens(self, features: Tensor) -> Tensor:
        return torch.arange(features.shape[0] * features.shape[1], device=features.device)

    def count_decode_tokens(self, num_visual_tokens: int, num_layers: int) -> int:
        return num_visual_tokens

    def first_pruned_layer(self, num_visual_tokens: int, num_layers: int) -> int:
        return num_layers

    def make_pruner(self, num_visual_tokens: int, num_layers: int) -> KVPruner | None:
        return None


class DyCoke:
    """Both stages of the paper: temporal token merging, then dynamic KV pruning with a DP cache."""

    def __init__(self, config: CompressionConfig) -> None:
        self._config = config

    @property
    def stage_one_key(self) -> tuple[object, ...]:
        return ("ttm", self._config.k, self._config.window, self._config.variant)

    def count_visual_tokens(self, num_frames: int, tokens_per_frame: int) -> int:
        c = self._config
        return ttm.count_tokens(
            num_frames, tokens_per_frame, c.k, window=c.window, variant=c.variant
        )

    def select_visual_tokens(self, features: Tensor) -> Tensor:
        c = self._config
        return ttm.select_tokens(features, c.k, window=c.window, variant=c.variant)

    def count_decode_tokens(self, num_visual_tokens: int, num_layers: int) -> int:
        if self.first_pruned_layer(num_visual_tokens, num_layers) == num_layers:
            return num_visual_tokens
        return share_of(1.0 - self._config.p, num_visual_tokens)

    def first_pruned_layer(self, num_visual_tokens: int, num_layers: int) -> int:
        return min(self._config.l, num_layers) if num_visual_tokens else num_layers

    def make_pruner(self, num_visual_tokens: int, num_layers: int) -> KVPruner | None:
        if self.first_pruned_layer(num_visual_tokens, num_layers) == num_layers:
            return None
        num_kept = self.count_decode_tokens(num_visual_tokens, num_layers)
        return KVPruner(num_visual_tokens, num_kept, self._config.threshold)


_POLICIES: Mapping[str, Callable[[CompressionConfig], Policy]] = {
    "full": FullTokens,
    "dycoke": DyCoke,
}


def make_policy(config: CompressionConfig) -> Policy:
    return _POLICIES[config.policy](config)
