"""Stage II, dynamic pruning of the KV cache while decoding: scores, selection and gate.

Decides which visual tokens a decode step attends to. Knows no cache layout: the engine passes in
the queries and keys of the scoring layer, and moves keys and values itself.

DyCoke keeps the highest scores. The other choices here are controls: a random choice under the same
gate, the lowest scores, and (`threshold=None`) a first selection that is never refreshed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dycoke_core.compression.randomness import random_order

# (scores [V], num_kept, step) → int64 [num_kept], ascending places; step 0 is the first decode step
KVChoice = Callable[[Tensor, int, int], Tensor]


def visual_scores(query: Tensor, keys: Tensor, log_total: Tensor, *, scaling: float) -> Tensor:
    """One query's attention to the visual tokens, averaged over the query heads.

    The softmax is over every key of the layer, including the new token's own: the layer's attention
    returns its denominator, so only the visual keys are read again.

    Args:
        query: [G, H/G, E], the current token's heads by key/value head.
        keys: [V, G, E], of the visual tokens.
        log_total: float32 [G, H/G], log of the softmax denominators.
        scaling: the model's factor on query-key products.

    Returns:
        float32 [V]; sums to at most 1.

    Source: paper Eq. 4, DYCOKE "Stage II" 2.
    """
    logits = torch.matmul(query.float(), keys.float().permute(1, 2, 0)) * scaling  # [G, H/G, V]
    return (logits - log_total[..., None]).exp().mean(dim=(0, 1))


def select_visual_tokens(scores: Tensor, num_kept: int) -> Tensor:
    """Indices of the highest scores, ascending; equal scores by lower index.

    Args:
        scores: [V].

    Returns:
        int64 [num_kept].
    """
    order = scores.sort(descending=True, stable=True).indices
    return order[:num_kept].sort().values


def choose_highest(scores: Tensor, num_kept: int, step: int) -> Tensor:
    """DyCoke's choice. Source: paper Eq. 6."""
    return select_visual_tokens(scores, num_kept)


def choose_lowest(scores: Tensor, num_kept: int, step: int) -> Tensor:
    """A control that must do worse if the scores mean anything. Ties by lower index as well.

    Source: DYCOKE "Controls and baselines".
    """
    return select_visual_tokens(-scores, num_kept)


@dataclass(frozen=True, slots=True)
class RandomChoice:
    """A control that ignores scores and picks by (seed, step).

    Source: DYCOKE "Controls and baselines".
    """

    seed: int

    def __call__(self, scores: Tensor, num_kept: int, step: int) -> Tensor:
        order = random_order(self.seed, step, scores.shape[0], scores.device)
        return order[:num_kept].sort().values


@dataclass(frozen=True, slots=True)
class StageTwo:
    """What stage II does to one sequence.

    Args:
        first_layer: L, the first pruned layer. Layer L - 1 scores, or layer 0 where L is 0.
        num_kept: n_keep, visual tokens that a pruned layer attends to.
        threshold: cosine at and above which a selection stays; None: the first is never refreshed.
    """

    first_layer: int
    num_kept: int
    threshold: float | None
    choose: KVChoice = choose_highest
    full_layers: tuple[int, ...] | None = None  # that attend to everything; None: all do

    @property
    def scoring_layer(self) -> int:
        if self.full_layers is None:
            return max(self.first_layer - 1, 0)
        earlier = [layer for layer in self.full_layers if layer < self.first_layer]
        return earlier[-1] if earlier else self.full_layers[0]

    def prunes(self, layer: int) -> bool:
        is_full = self.full_layers is None or layer in self.full_layers
        return layer >= self.first_layer and is_full

    def in_layers(self, full_layers: Sequence[int], num_layers: int) -> "StageTwo | None":
        """The same in a model some of whose layers see a window alone; None: nothing is left.

        A window holds few visual tokens and says little of the others, so such layers neither score
        nor are pruned. The last other layer below L scores; where there is none the first one does,
        and those after it are pruned.
        """
        if len(full_layers) == num_layers:
            return self
        if not full_layers:
            return None
        first_layer = self.first_layer
        if first_layer or full_layers[0]:
            first_layer = max(first_layer, full_layers[0] + 1)
        if first_layer > full_layers[-1]:
            return None
        return replace(self, first_layer=first_layer, full_layers=tuple(full_layers))


def scores_agree(scores: Tensor, reference: Tensor, threshold: float) -> Tensor:
    """Whether the cosine of two score vectors reaches the threshold; never at zero norm.

    Args:
        scores, reference: [V] float32.

    Returns:
        bool [], on the scores' device; the host does not wait for it.
    """
    norms = scores.norm() * reference.norm()
    return torch.logical_and(norms > 0, scores @ reference >= threshold * norms)


@dataclass(slots=True, eq=False)
class KVPruner:
    """The stage-II state of one sequence: its kept set and the scores at its last selection.

    The reference changes only at a selection, so slow drifts add up to a refresh. The tensors have
    fixed shapes and stay on the scores' device; no update waits for the device.
    """

    num_visual_tokens: int  # V
    num_kept: int  # n_keep, fixed for the sequence
    threshold: float | None  # None: the first selection is never refreshed
    choose: KVChoice = choose_highest
    num_steps: int = 0  # decode steps seen; a replay counts the same
    kept: Tensor | None = None  # int64 [n_keep], ascending places among the V tokens
    reference: Tensor | None = None  # float32 [V], scores of the last selection
    num_refreshes: Tensor | None = None  # int64 []

    def update(self, scores: Tensor) -> Tensor:
        """Takes one decode step's scores and selects again if the gate opens.

        Args:
            scores: float32 [V], attention of the scoring layer at the visual positions.

        Returns:
            bool [], whether the kept set is a new one.

        Source: paper section 3.3, DYCOKE "Stage II" 3-5; without a threshold Table 5, "w/o DP".
        Deviation: the released code attends to everything while attention is stable, and compares
            with the previous step instead of the last selection.
        """
        step = self.num_steps
        self.num_steps += 1
        if self.kept is not None and self.threshold is None:
            return torch.zeros((), dtype=torch.bool, device=scores.device)
        if self.kept is None or self.reference is None or self.num_refreshes is None:
            self.kept, self.reference = self.choose(scores, self.num_kept, step), scores
            self.num_refreshes = torch.zeros((), dtype=torch.int64, device=scores.device)
            return torch.ones((), dtype=torch.bool, device=scores.device)
        assert self.threshold is not None
        is_stable = scores_agree(scores, self.reference, self.threshold)
        if is_stable.device.type == "cpu" and is_stable:  # known at once, and no sort is needed
            return ~is_stable
        selected = self.choose(scores, self.num_kept, step)
        self.kept = torch.where(is_stable, self.kept, selected)
        self.reference = torch.where(is_stable, self.reference, scores)
        self.num_refreshes = self.num_refreshes + (~is_stable)
        return ~is_stable
