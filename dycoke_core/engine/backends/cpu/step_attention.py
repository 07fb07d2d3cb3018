"""What one step's rows attend to, layer by layer: chunks of prompts beside decode rows.

All rows of a step go through the model's layers together, so its weights are read once for all;
only attention tells them apart. Implements `dycoke_core.model.attention.LayerAttention`.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dycoke_core.compression.kv_pruning import KVPruner, visual_scores
from dycoke_core.engine.attention import (
    Partial,
    attend,
    attend_causally,
    merge,
    pack_queries,
    unpack_rows,
)
from dycoke_core.engine.backends.cpu.kv_cache import PrefixKV, SequenceKV


@dataclass(slots=True, eq=False)
class StepAttention:
    """Rows in this order: chunks of prefixes, of questions, one row per decoding sequence."""

    prefix_chunks: Sequence[tuple[PrefixKV, int]]  # with their number of rows
    question_chunks: Sequence[tuple[SequenceKV, int]]
    decoding: Sequence[SequenceKV]
    _changed: dict[int, bool] = field(default_factory=dict)  # by place in `decoding`
    _pruners_before: list[KVPruner | None] = field(init=False)

    def __post_init__(self) -> None:
        self._pruners_before = [copy(sequence.pruner) for sequence in self.decoding]

    def roll_back(self) -> None:
        """Undoes the pass for every cache and selection that it touched."""
        for prefix, _ in self.prefix_chunks:
            prefix.roll_back()
        for sequence, _ in self.question_chunks:
            sequence.roll_back()
        for sequence, pruner in zip(self.decoding, self._pruners_before, strict=True):
            sequence.roll_back()
            sequence.pruner = pruner
            sequence.must_load_kept_rows = True

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        queries, keys, values = (t[0].transpose(0, 1) for t in (query, key, value))  # [q, *, E]
        output = torch.empty_like(queries)
        start = 0
        for prefix, num_rows in self.prefix_chunks:
            rows = slice(start, start + num_rows)
            output[rows] = _attend_prefix_chunk(
                prefix, layer, queries[rows], keys[rows], values[rows], scaling
            )
            start += num_rows
        for sequence, num_rows in self.question_chunks:
            rows = slice(start, start + num_rows)
            output[rows] = _attend_question_chunk(
                sequence, layer, queries[rows], keys[rows], values[rows], scaling
            )
            start += num_rows
        if self.decoding:
            rows = slice(start, None)
            output[rows] = self._decode(layer, queries[rows], keys[rows], values[rows], scaling)
        return output[None]

    def _decode(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scaling: float
    ) -> Tensor:
        """[B, H, E], one row per sequence."""
        outputs: list[Tensor] = []
        shape = (len(queries), keys.shape[1], -1, queries.shape[-1])
        packed = queries.view(shape).unbind()  # [G, H/G, E] each, no copies
        for place, sequence in enumerate(self.decoding):
            sequence.slabs[layer].append(keys[place : place + 1], values[place : place + 1])
        over_prefix = self._attend_prefixes(layer, packed, scaling)
        for place, sequence in enumerate(self.decoding):
            whole: Partial | None = None
            if place in over_prefix:
                own = attend(packed[place], *sequence.own_rows(layer), scaling=scaling)
                whole = merge(over_prefix[place], own)
                if layer == sequence.scoring_layer:
                    self._update_selection(place, packed[place], whole, scaling)
            if sequence.is_pruned(layer):
                self._load_kept_rows(place, layer)
                whole = attend(packed[place], *sequence.slabs[layer].rows(), scaling=scaling)
            assert whole is not None
            outputs.append(whole.output)
        return torch.stack(outputs).flatten(1, 2)

    def _attend_prefixes(
        self, layer: int, packed: Sequence[Tensor], scaling: float
    ) -> dict[int, Partial]:
        """By place: attention over the prefix, for those that need it in this layer.

        Sequences that share a prefix share one read of it: their queries are packed together.
        """
        sharing: dict[int, list[int]] = {}
        for place, sequence in enumerate(self.decoding):
            if layer == sequence.scoring_layer or not sequence.is_pruned(layer):
                sharing.setdefault(id(sequence.prefix), []).append(place)
        partials: dict[int, Partial] = {}
        for places in sharing.values():
            keys, values = self.decoding[places[0]].prefix.slabs[layer].rows()
            together = torch.cat([packed[place] for place in places], dim=1)
            partial = attend(together, keys, values, scaling=scaling)
            parts = zip(
                partial.output.chunk(len(places), dim=1),
                partial.log_total.chunk(len(places), dim=1),
                strict=True,
            )
            partials.update(zip(places, (Partial(*part) for part in parts), strict=True))
        return partials

    def _update_selection(
        self, place: int, queries: Tensor, whole: Partial, scaling: float
    ) -> None:
        sequence = self.decoding[place]
        assert sequence.pruner is not None and sequence.scoring_layer is not None
        keys, _ = sequence.prefix.visual_rows(sequence.scoring_layer)
        scores = visual_scores(queries, keys, whole.log_total, scaling=scaling)
        self._changed[place] = bool(sequence.pruner.update(scores))

    def _load_kept_rows(self, place: int, layer: int) -> None:
        """After a new selection, and after a failed pass."""
        sequence = self.decoding[place]
        if self._changed[place] or sequence.must_load_kept_rows:
            sequence.load_kept_rows(layer)
            if layer == len(sequence.slabs) - 1:
                sequence.must_load_kept_rows = False


def _attend_prefix_chunk(
    prefix: PrefixKV, layer: int, query: Tensor, keys: Tensor, values: Tensor, scaling: float
) -> Tensor:
    slab = prefix.slabs[layer]
    partial = attend_causally(query, keys, values, scaling=scaling)
    if slab.length:
        packed = pack_queries(query, keys.shape[1])
        partial = merge(attend(packed, *slab.rows(), scaling=scaling), partial)
    slab.append(keys, values)
    return unpack_rows(partial.output, query.shape[0])


def _attend_question_chunk(
    sequence: SequenceKV, layer: int, query: Tensor, keys: Tensor, values: Tensor, scaling: float
) -> Tensor:
    packed = pack_queries(query, keys.shape[1])
    partial = attend_causally(query, keys, values, scaling=scaling)
    earlier_keys, earlier_values = sequence.own_rows(layer)
    if len(earlier_keys):
        partial = merge(attend(packed, earlier_keys, earlier_values, scaling=scaling), partial)
    prefix_rows = sequence.prefix.slabs[layer].rows()
    partial = merge(attend(packed, *prefix_rows, scaling=scaling), partial)
    sequence.slabs[layer].append(keys, values)
    return unpack_rows(partial.output, query.shape[0])
