"""Keys and values of one sequence, and the attention over them.

Token-major slabs, allocated once at their final size: no concatenation per step, and a refresh
gathers whole rows. Keys are stored after RoPE, at absolute positions, so they may lie in any order.

While prefilling, every layer holds the whole prompt. At the first decode step, each layer that
stage II prunes is split in two:

    DP cache    the V visual rows, immutable, read at a refresh only
    active      [n_keep kept visual rows | text rows of the prompt | generated rows]

so that a decode step in a pruned layer reads n_keep + text rows, and a refresh costs one gather of
n_keep rows per layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dycoke_core.compression.flops import TextGeometry
from dycoke_core.compression.kv_pruning import KVPruner, attention_scores


@dataclass(slots=True, eq=False)
class Slab:
    """Rows of keys and values of one layer: [capacity, G, E] each, `length` of them in use."""

    keys: Tensor
    values: Tensor
    length: int = 0

    @classmethod
    def allocate(cls, capacity: int, like: Tensor) -> "Slab":
        """`like`: [..., G, E] on the device and in the dtype wanted."""
        shape = (capacity, *like.shape[-2:])
        return cls(like.new_empty(shape), like.new_empty(shape))

    def append(self, keys: Tensor, values: Tensor) -> None:
        """keys, values: [q, G, E]."""
        end = self.length + keys.shape[0]
        self.keys[self.length : end] = keys
        self.values[self.length : end] = values
        self.length = end

    def used(self) -> tuple[Tensor, Tensor]:
        return self.keys[: self.length], self.values[: self.length]

    @property
    def used_bytes(self) -> int:
        return self.length * self._row_bytes

    @property
    def reserved_bytes(self) -> int:
        return self.keys.shape[0] * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return 2 * self.keys[0:1].numel() * self.keys.element_size()


class SequenceCache:
    """The cache of one sequence, and what its queries attend to in prefill and in decode.

    Implements `dycoke_core.model.attention.LayerAttention`. Whether a pass is a decode step is told
    by `begin_decode`, not by its length.

    Args:
        visual_positions: int64 [V], places of the visual tokens in the prompt.
        first_pruned_layer: L; the number of layers where stage II is off.
        pruner: the sequence's stage-II state, None where it is off.
        max_new_tokens: decode steps that the cache has room for.
    """

    def __init__(
        self,
        geometry: TextGeometry,
        *,
        num_prompt_tokens: int,
        max_new_tokens: int,
        visual_positions: Tensor,
        first_pruned_layer: int,
        pruner: KVPruner | None,
        dtype: torch.dtype,
    ) -> None:
        self.num_tokens = 0  # that the model has seen: the next token's position
        self.pruner = pruner
        self._first_pruned_layer = first_pruned_layer
        self._scoring_layer = max(first_pruned_layer - 1, 0)
        self._visual_positions = visual_positions
        self._max_new_tokens = max_new_tokens
        self._is_decoding = False
        self._is_new_selection = torch.zeros((), dtype=torch.bool)
        self._dp_cache: dict[int, Slab] = {}
        like = torch.empty(
            (geometry.num_kv_heads, geometry.head_size),
            dtype=dtype,
            device=visual_positions.device,
        )
        self._slabs = [
            Slab.allocate(num_prompt_tokens + self._room_for_answer(layer), like)
            for layer in range(geometry.num_layers)
        ]

    @property
    def active_bytes(self) -> int:
        """Bytes of the rows that the next step attends to."""
        return sum(slab.used_bytes for slab in self._slabs)

    @property
    def dp_cache_bytes(self) -> int:
        return sum(slab.used_bytes for slab in self._dp_cache.values())

    @property
    def reserved_bytes(self) -> int:
        return sum(slab.reserved_bytes for slab in [*self._slabs, *self._dp_cache.values()])

    def begin_decode(self) -> None:
        """From the next pass on, each pass is a decode step of one token."""
        self._is_decoding = True

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        if self._is_decoding and self._is_pruned(layer) and layer not in self._dp_cache:
            self._split(layer)
        slab = self._slabs[layer]
        slab.append(key[0].transpose(0, 1), value[0].transpose(0, 1))
        if not self._is_decoding:
            return prefill_attention(query, *slab.used(), scaling=scaling)
        if self.pruner is not None and layer == self._scoring_layer:
            self._update_selection(self.pruner, layer, query, scaling)
        if self._is_pruned(layer):
            self._load_kept_rows(layer)
        return decode_attention(query, *slab.used(), scaling=scaling)

    def _is_pruned(self, layer: int) -> bool:
        return layer >= self._first_pruned_layer

    def _room_for_answer(self, layer: int) -> int:
        """A pruned layer's generated rows go to its active slab, made at the first decode step."""
        return 0 if self._is_pruned(layer) else self._max_new_tokens

    def _split(self, layer: int) -> None:
        """Parts a prompt's rows into the DP cache and the active slab, and frees the former."""
        assert self.pruner is not None
        keys, values = self._slabs[layer].used()
        is_text = torch.ones(keys.shape[0], dtype=torch.bool, device=keys.device)
        is_text[self._visual_positions] = False
        num_text = keys.shape[0] - self.pruner.num_visual_tokens
        text_rows = torch.argsort((~is_text).to(torch.uint8), stable=True)[:num_text]
        dp_keys = keys.index_select(0, self._visual_positions)
        dp_values = values.index_select(0, self._visual_positions)
        self._dp_cache[layer] = Slab(dp_keys, dp_values, length=dp_keys.shape[0])
        capacity = self.pruner.num_kept + num_text + self._max_new_tokens
        active = Slab.allocate(capacity, like=keys)
        active.length = self.pruner.num_kept  # filled by `_load_kept_rows` in this same step
        active.append(keys.index_select(0, text_rows), values.index_select(0, text_rows))
        self._slabs[layer] = active

    def _update_selection(
        self, pruner: KVPruner, layer: int, query: Tensor, scaling: float
    ) -> None:
        """Scores over every key of the layer, then restricted to the visual positions."""
        keys, _ = self._slabs[layer].used()
        visual = self._visual_positions
        if self._is_pruned(layer):  # L = 0: the layer scores before its own pruning
            keys = torch.cat([self._dp_cache[layer].keys, keys[pruner.num_kept :]])
            visual = torch.arange(pruner.num_visual_tokens, device=keys.device)
        scores = attention_scores(query[0, :, 0], keys, scaling=scaling)
        self._is_new_selection = pruner.update(scores[visual])

    def _load_kept_rows(self, layer: int) -> None:
        """Copies the kept rows from the DP cache to the front of the active slab.

        On a CPU only after a new selection. On a GPU at every step, because asking whether the
        selection is new would make the host wait for the device.
        """
        assert self.pruner is not None and self.pruner.kept is not None
        kept = self.pruner.kept
        if kept.device.type == "cpu" and not bool(self._is_new_selection):
            return
        source, active = self._dp_cache[layer], self._slabs[layer]
        torch.index_select(source.keys, 0, kept, out=active.keys[: kept.shape[0]])
        torch.index_select(source.values, 0, kept, out=active.values[: kept.shape[0]])


def prefill_attention(query: Tensor, keys: Tensor, values: Tensor, *, scaling: float) -> Tensor:
    """Causal attention of the last q of S tokens.

    Args:
        query: [1, H, q, E]; keys, values: [S, G, E], the queries' own last.

    Returns:
        [1, q, H, E]. Keys are broadcast to the query heads of their group, not copied.
    """
    num_kv_heads, num_queries = keys.shape[1], query.shape[2]
    grouped = query.view(num_kv_heads, -1, *query.shape[2:])  # [G, H/G, q, E]
    num_past = keys.shape[0] - num_queries
    mask = None
    if num_past:
        mask = torch.ones(num_queries, keys.shape[0], dtype=torch.bool, device=keys.device)
        mask = mask.tril(diagonal=num_past)
    group_size = grouped.shape[1]
    output = scaled_dot_product_attention(
        grouped,
        keys.permute(1, 0, 2)[:, None].expand(-1, group_size, -1, -1),
        values.permute(1, 0, 2)[:, None].expand(-1, group_size, -1, -1),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
    )
    return output.flatten(0, 1).transpose(0, 1)[None]


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, *, scaling: float) -> Tensor:
    """Attention of one token over all keys, the query heads of a KV head packed as rows.

    Args:
        query: [1, H, 1, E]; keys, values: [S, G, E].

    Returns:
        [1, 1, H, E]. Reads every key and value once; packed rows are 20 times faster on a CPU than
        `enable_gqa`.
    """
    grouped = query.view(1, keys.shape[1], -1, query.shape[-1])  # [1, G, H/G, E]
    output = scaled_dot_product_attention(
        grouped, keys.permute(1, 0, 2)[None], values.permute(1, 0, 2)[None], scale=scaling
    )
    return output.flatten(1, 2)[None]
