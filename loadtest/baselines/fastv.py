"""FastV: an early layer drops the visual tokens that the last prompt token attends to least."""

import torch
from torch import Tensor

from dycoke_core.compression.counts import share_of
from dycoke_core.compression.kv_pruning import select_visual_tokens
from loadtest.baselines.cached_attention import (
    CachedAttention,
    attend_causally,
    attention_weights,
)


class FastVAttention(CachedAttention):
    """A `LayerAttention` for one answer: the first call of each layer is the whole prompt.

    Layers below `layer` see every token. The attention of layer - 1 from the prompt's last token,
    averaged over heads, ranks the visual tokens; from `layer` on, prompt and answer attend only to
    the kept ones. Rows of dropped tokens still pass through the later layers, but nothing attends
    to them: the answers are those of a shorter prompt.

    Args:
        visual: places of the visual tokens in the prompt.
        layer: the first layer that prunes, 1 or more.
        retained_ratio: share of the visual tokens that stays.

    Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, the version with
        KV cache; DyCoke's paper runs it with layer 5 and 35 %.
    Deviation: kept tokens keep their positions and their order; ties by lower index.
    """

    def __init__(self, visual: range, *, layer: int, retained_ratio: float) -> None:
        if layer < 1:
            raise ValueError("layer must be at least 1: the layer before it ranks")
        super().__init__()
        self.layer = layer
        self.kept: Tensor | None = None  # int64, ascending places among the visual tokens
        self._visual = visual
        self._num_kept = share_of(retained_ratio, len(visual))
        self._rows = torch.empty(0, dtype=torch.long)  # of the prompt, that later layers know

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        is_prompt = layer not in self.keys
        if is_prompt and layer >= self.layer:
            return self._attend_pruned(layer, query, key, value, scaling)
        output = super().attend(layer, query, key, value, scaling)
        if is_prompt and layer == self.layer - 1:
            self._rank(query[0, :, -1], self.keys[layer], scaling)
        return output

    def _rank(self, last_query: Tensor, keys: Tensor, scaling: float) -> None:
        start, stop = self._visual.start, self._visual.stop
        scores = attention_weights(last_query, keys, scaling)[start:stop]
        self.kept = select_visual_tokens(scores, self._num_kept)
        places = torch.arange(keys.shape[0], device=keys.device)
        self._rows = torch.cat([places[:start], start + self.kept, places[stop:]])

    def _attend_pruned(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        queries, keys, values = (t[0].transpose(0, 1) for t in (query, key, value))
        output = torch.zeros_like(queries)
        keys, values = self.extend(layer, keys[self._rows], values[self._rows])
        output[self._rows] = attend_causally(queries[self._rows], keys, values, scaling)
        return output[None]
