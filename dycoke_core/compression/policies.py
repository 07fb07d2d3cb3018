"""Compression policies: a stage-I selector and a stage-II rule under one name.

`dycoke_core.config.POLICY_PARAMETERS` names the policies and their parameters without torch; this
module builds them. A control is `dycoke` with one of the two stages replaced, so any difference in
its answers is due to that stage. To add a policy, add a line to `_POLICIES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from dycoke_core.compression.counts import share_of
from dycoke_core.compression.kv_pruning import (
    KVChoice,
    RandomChoice,
    StageTwo,
    choose_highest,
    choose_lowest,
)
from dycoke_core.compression.selectors import (
    AllTokens,
    FewerFrames,
    RandomTokens,
    Selector,
    TemporalMerging,
    VidCom2,
)
from dycoke_core.config import CompressionConfig


@dataclass(frozen=True, slots=True)
class KVRule:
    """A stage II: from which layer on, how much, and which visual tokens stay."""

    first_layer: int  # L
    p: float
    threshold: float | None  # None: the first selection is never refreshed
    choose: KVChoice


@dataclass(frozen=True, slots=True)
class Policy:
    """What the engine needs from a policy. Stateless: a sequence's state is in the backend."""

    selector: Selector
    kv_rule: KVRule | None = None

    @property
    def stage_one_key(self) -> tuple[object, ...]:
        """Everything that the choice of `select_visual_tokens` depends on, besides the features."""
        return self.selector.key

    def count_visual_tokens(self, num_frames: int, tokens_per_frame: int) -> int:
        """V, known before encoding."""
        return self.selector.count(num_frames, tokens_per_frame)

    def count_per_frame(self, num_frames: int, tokens_per_frame: int) -> tuple[int, ...] | None:
        """V per frame, known before encoding; None if the features decide, as with vidcom2."""
        return self.selector.count_per_frame(num_frames, tokens_per_frame)

    def select_visual_tokens(self, features: Tensor) -> Tensor:
        """Stage I: int64 [V] places among the F * N tokens of features [F, N, D]."""
        return self.selector.select(features)

    def count_decode_tokens(self, num_visual_tokens: int, num_layers: int) -> int:
        """n_keep: visual tokens that a pruned layer attends to in a decode step."""
        rule = self._active_rule(num_visual_tokens, num_layers)
        return num_visual_tokens if rule is None else share_of(1.0 - rule.p, num_visual_tokens)

    def first_pruned_layer(self, num_visual_tokens: int, num_layers: int) -> int:
        """The layer from which decode steps attend to the kept set; num_layers: stage II is off."""
        rule = self._active_rule(num_visual_tokens, num_layers)
        return num_layers if rule is None else rule.first_layer

    def stage_two(self, num_visual_tokens: int, num_layers: int) -> StageTwo | None:
        """What stage II does to a sequence; None if it is off."""
        rule = self._active_rule(num_visual_tokens, num_layers)
        if rule is None:
            return None
        num_kept = self.count_decode_tokens(num_visual_tokens, num_layers)
        return StageTwo(rule.first_layer, num_kept, rule.threshold, rule.choose)

    def _active_rule(self, num_visual_tokens: int, num_layers: int) -> KVRule | None:
        rule = self.kv_rule
        if rule is None or rule.first_layer >= num_layers or num_visual_tokens == 0:
            return None
        return rule


def _full(config: CompressionConfig) -> Policy:
    return Policy(AllTokens())


def _dycoke(config: CompressionConfig) -> Policy:
    return Policy(_merging(config), _kv_rule(config))


def _random_ttm(config: CompressionConfig) -> Policy:
    return Policy(RandomTokens(config.k, config.window, config.seed), _kv_rule(config))


def _fewer_frames(config: CompressionConfig) -> Policy:
    return Policy(FewerFrames(config.k, config.window), _kv_rule(config))


def _dycoke_one_shot(config: CompressionConfig) -> Policy:
    rule = KVRule(config.l, config.p, threshold=None, choose=choose_highest)
    return Policy(_merging(config), rule)


def _random_kv(config: CompressionConfig) -> Policy:
    return Policy(_merging(config), _kv_rule(config, RandomChoice(config.seed)))


def _lowest_kv(config: CompressionConfig) -> Policy:
    return Policy(_merging(config), _kv_rule(config, choose_lowest))


def _vidcom2(config: CompressionConfig) -> Policy:
    return Policy(VidCom2(config.retained_ratio))


def _merging(config: CompressionConfig) -> TemporalMerging:
    return TemporalMerging(config.k, config.window, config.variant)


def _kv_rule(config: CompressionConfig, choose: KVChoice = choose_highest) -> KVRule:
    return KVRule(config.l, config.p, config.threshold, choose)


_POLICIES: Mapping[str, Callable[[CompressionConfig], Policy]] = {
    "full": _full,
    "dycoke": _dycoke,
    "random_ttm": _random_ttm,
    "fewer_frames": _fewer_frames,
    "vidcom2": _vidcom2,
    "dycoke_one_shot": _dycoke_one_shot,
    "random_kv": _random_kv,
    "lowest_kv": _lowest_kv,
}


def make_policy(config: CompressionConfig) -> Policy:
    return _POLICIES[config.policy](config)
