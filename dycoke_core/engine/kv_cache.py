"""Keys and values: a video's shared prefix, and each sequence's own.

Token-major slabs, allocated once at their final size: no concatenation per step, and a refresh
gathers whole rows. Keys are stored after RoPE, at absolute positions, so they may lie in any order.

    PrefixKV      system text | V visual rows | newline
                  in every layer; immutable once prefilled, shared by all sequences that ask
                  about the video. It is also their DP cache.
    SequenceKV    layers < L: question | generated
                  layers >= L: n_keep kept visual rows | the prefix's text rows | question |
                  generated

A decode step reads prefix and own rows in layers below L, own rows alone from L on. A refresh costs
one gather of n_keep rows per pruned layer.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dycoke_core.compression.flops import TextGeometry
from dycoke_core.compression.kv_pruning import KVPruner


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
        assert end <= self.keys.shape[0], "a slab is allocated at its final size"
        self.keys[self.length : end] = keys
        self.values[self.length : end] = values
        self.length = end

    def on_host(self) -> "Slab":
        """The same rows in pinned host memory."""
        if self.keys.device.type == "cpu":
            return self
        return Slab(self.keys.cpu().pin_memory(), self.values.cpu().pin_memory(), self.length)

    def rows(self, start: int = 0, end: int | None = None) -> tuple[Tensor, Tensor]:
        """Used rows from `start` to `end`, as views."""
        end = self.length if end is None else end
        return self.keys[start:end], self.values[start:end]


def row_bytes(geometry: TextGeometry, dtype: torch.dtype) -> int:
    """Bytes of one token in one layer."""
    return 2 * geometry.num_kv_heads * geometry.head_size * dtype.itemsize


@dataclass(slots=True, eq=False)
class PrefixKV:
    """The prompt up to the newline, for every question about a video.

    `num_tokens` grows while it is prefilled; then nothing writes to it again.
    """

    slabs: list[Slab]
    num_capacity_tokens: int
    first_visual: int
    num_visual: int  # V
    num_tokens: int = 0
    text_rows: Tensor = field(init=False)  # int64, places of the tokens that are not visual

    def __post_init__(self) -> None:
        places = torch.arange(self.num_capacity_tokens, device=self.slabs[0].keys.device)
        is_text = (places < self.first_visual) | (places >= self.first_visual + self.num_visual)
        self.text_rows = places[is_text]

    @property
    def is_complete(self) -> bool:
        return self.num_tokens == self.num_capacity_tokens

    def roll_back(self) -> None:
        """Drops the rows of a pass that failed."""
        for slab in self.slabs:
            slab.length = self.num_tokens

    def move_to_host(self, first_layer: int) -> None:
        """Keeps the layers from `first_layer` on in host memory, once for all that share them.

        Frees their device memory. On a CPU device and host are the same memory and nothing moves.
        """
        assert self.is_complete
        on_host = [slab.on_host() for slab in self.slabs[first_layer:]]
        self.slabs[first_layer:] = on_host  # only once all have found room

    @property
    def is_partly_on_host(self) -> bool:
        """Whether layers lie in another memory than the device's."""
        return self.slabs[-1].keys.device != self.text_rows.device

    def rows_on_device(self, layer: int) -> tuple[Tensor, Tensor]:
        """All rows of a layer, staged from the host where they lie there: one layer at a time."""
        device = self.text_rows.device
        keys, values = self.slabs[layer].rows()
        return keys.to(device, non_blocking=True), values.to(device, non_blocking=True)

    def visual_rows(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.slabs[layer].rows(self.first_visual, self.first_visual + self.num_visual)


class SequenceKV:
    """One sequence's own rows over a shared prefix, and its stage-II state.

    Args:
        first_pruned_layer: L; the number of layers where stage II is off.
        pruner: the sequence's stage-II state, None where it is off.
        max_own_tokens: room for the question and the answer.
    """

    def __init__(
        self,
        geometry: TextGeometry,
        prefix: PrefixKV,
        *,
        max_own_tokens: int,
        first_pruned_layer: int,
        pruner: KVPruner | None,
    ) -> None:
        self.prefix = prefix
        self.pruner = pruner
        self.first_pruned_layer = first_pruned_layer
        self.scoring_layer = max(first_pruned_layer - 1, 0)
        self.must_load_kept_rows = False  # since a failed pass left others in their place
        self._kept_on_host: tuple[Tensor, Tensor] | None = None  # a kept set and its copy there
        self.num_own_tokens = 0  # question and answer tokens that the model has seen
        self.is_decoding = False
        num_kept = pruner.num_kept if pruner is not None else 0
        self._num_front_rows = num_kept + len(prefix.text_rows)
        like = prefix.slabs[0].keys
        self.slabs = []
        for layer in range(geometry.num_layers):
            front = self._num_front_rows if self.is_pruned(layer) else 0
            slab = Slab.allocate(front + max_own_tokens, like)
            slab.length = front
            self.slabs.append(slab)

    @property
    def num_tokens(self) -> int:
        """That the model has seen: the next token's position."""
        return self.prefix.num_tokens + self.num_own_tokens

    @property
    def num_active_rows(self) -> int:
        """Rows that a decode step reads, over all layers; the prefix's count for each sequence."""
        shared = self.first_pruned_layer * self.prefix.num_tokens
        return shared + sum(slab.length for slab in self.slabs)

    def is_pruned(self, layer: int) -> bool:
        return layer >= self.first_pruned_layer

    def begin_decode(self) -> None:
        """From the next pass on, each pass is a decode step of one token. Fills the text rows of
        the prefix into the pruned layers; the kept rows come with the first selection."""
        self.is_decoding = True
        num_kept = self.pruner.num_kept if self.pruner is not None else 0
        for layer in range(self.first_pruned_layer, len(self.slabs)):
            keys, values = self.prefix.slabs[layer].rows()
            text_rows = slice(num_kept, self._num_front_rows)
            places = self.prefix.text_rows.to(keys.device)
            _copy_rows(keys, places, self.slabs[layer].keys[text_rows])
            _copy_rows(values, places, self.slabs[layer].values[text_rows])

    def roll_back(self) -> None:
        """Drops the rows of a pass that failed."""
        for layer, slab in enumerate(self.slabs):
            front = self._num_front_rows if self.is_pruned(layer) else 0
            slab.length = front + self.num_own_tokens

    def own_rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the question and the answer alone."""
        return self.slabs[layer].rows(self._num_front_rows if self.is_pruned(layer) else 0)

    def load_kept_rows(self, layer: int) -> None:
        """Copies the kept rows from the prefix to the front of a pruned layer's slab."""
        assert self.pruner is not None and self.pruner.kept is not None
        keys, values = self.prefix.visual_rows(layer)
        kept, own = self._kept_beside(keys), self.slabs[layer]
        _copy_rows(keys, kept, own.keys[: len(kept)])
        _copy_rows(values, kept, own.values[: len(kept)])

    def _kept_beside(self, rows: Tensor) -> Tensor:
        """The kept set in the memory that `rows` lie in; fetched once for all layers."""
        assert self.pruner is not None and self.pruner.kept is not None
        kept = self.pruner.kept
        if kept.device == rows.device:
            return kept
        if self._kept_on_host is None or self._kept_on_host[0] is not kept:
            self._kept_on_host = kept, kept.to(rows.device)
        return self._kept_on_host[1]


def _copy_rows(rows: Tensor, places: Tensor, out: Tensor) -> None:
    """Gathers rows [n, G, E] into `out`, on the same device or from host memory."""
    if rows.device == out.device:
        torch.index_select(rows, 0, places, out=out)
    else:
        out.copy_(rows[places].pin_memory(), non_blocking=True)
