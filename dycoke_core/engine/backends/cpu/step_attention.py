"""The attention of one step, layer by layer: chunks of prompts together with decode rows.

All rows of a step go through the model's layers together, so its weights are read once for all;
only attention treats them differently. Implements
`dycoke_core.model.layer_attention.LayerAttention`.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from dycoke_core.compression.kv_pruning import KVPruner, visual_scores
from dycoke_core.engine.backends.cpu.kv_cache import PrefixKV, SequenceKV
from dycoke_core.engine.partial_attention import (
    Partial,
    attend,
    attend_causally,
    attend_masked,
    merge,
    pack_queries,
    unpack_rows,
)
from dycoke_core.engine.sight import end_seen, first_seen

Owner = TypeVar("Owner", PrefixKV, SequenceKV)


class _Sight(NamedTuple):
    """What a chunk's rows see in layers of one kind.

    first: place in the prefix from which on keys are looked at.
    is_seen: bool [rows, keys].
    """

    first: int
    is_seen: Tensor


@dataclass(slots=True, eq=False)
class StepAttention:
    """Rows in this order: chunks of prefixes, of questions, one row per decoding sequence."""

    prefix_chunks: Sequence[tuple[PrefixKV, int]]  # with their number of rows
    question_chunks: Sequence[tuple[SequenceKV, int]]
    decoding: Sequence[SequenceKV]
    windows: Sequence[int | None]  # by layer
    _sights: dict[tuple[int, int | None], _Sight] = field(default_factory=dict)  # of chunks
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
        window = self.windows[layer]
        for prefix, num_rows in self.prefix_chunks:
            rows = slice(start, start + num_rows)
            new = (queries[rows], keys[rows], values[rows])
            if window is None and not prefix.whole_runs:
                output[rows] = _attend_prefix_chunk(prefix, layer, *new, scaling)
            else:
                sight = self._sight(prefix, window, num_rows, _prefix_sight)
                output[rows] = _attend_prefix_by_sight(prefix, layer, *new, scaling, sight)
            start += num_rows
        for sequence, num_rows in self.question_chunks:
            rows = slice(start, start + num_rows)
            new = (queries[rows], keys[rows], values[rows])
            if window is None:
                output[rows] = _attend_question_chunk(sequence, layer, *new, scaling)
            else:
                sight = self._sight(sequence, window, num_rows, _question_sight)
                output[rows] = _attend_question_by_sight(sequence, layer, *new, scaling, sight)
            start += num_rows
        if self.decoding:
            rows = slice(start, None)
            output[rows] = self._decode(layer, queries[rows], keys[rows], values[rows], scaling)
        return output[None]

    def _sight(
        self,
        owner: Owner,
        window: int | None,
        num_rows: int,
        of_chunk: Callable[[Owner, int, int | None], _Sight],
    ) -> _Sight:
        """The same in every layer of a kind."""
        key = id(owner), window
        if key not in self._sights:
            self._sights[key] = of_chunk(owner, num_rows, window)
        return self._sights[key]

    def _decode(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scaling: float
    ) -> Tensor:
        """[B, H, E], one row per sequence."""
        outputs: list[Tensor] = []
        shape = (len(queries), keys.shape[1], -1, queries.shape[-1])
        packed = queries.view(shape).unbind()  # [G, H/G, E] each, no copies
        for place, sequence in enumerate(self.decoding):
            sequence.slabs[layer].append(keys[place : place + 1], values[place : place + 1])
        window = self.windows[layer]
        over_prefix = self._attend_prefixes(layer, packed, scaling)
        for place, sequence in enumerate(self.decoding):
            whole: Partial | None = None
            if not sequence.is_pruned(layer) or place in over_prefix:
                rows = _own_rows_seen(sequence, layer, window)
                whole = attend(packed[place], *rows, scaling=scaling)
                if place in over_prefix:
                    whole = merge(over_prefix[place], whole)
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

        Sequences that share a prefix share one read of it: their queries are packed together. Those
        whose window has moved past it need none of it.
        """
        sharing: dict[tuple[int, int], list[int]] = {}
        for place, sequence in enumerate(self.decoding):
            if layer == sequence.scoring_layer or not sequence.is_pruned(layer):
                first = _first_of_prefix(sequence, self.windows[layer])
                if first < sequence.prefix.layout.num_tokens:
                    sharing.setdefault((id(sequence.prefix), first), []).append(place)
        partials: dict[int, Partial] = {}
        for (_, first), places in sharing.items():
            keys, values = self.decoding[places[0]].prefix.slabs[layer].rows(first)
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
            if layer == sequence.last_pruned_layer:
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


# --- windows, and runs that see themselves as a whole ---


def _prefix_sight(prefix: PrefixKV, num_rows: int, window: int | None) -> _Sight:
    start = prefix.num_tokens
    end = end_seen(start, num_rows, prefix.whole_runs)
    first = np.zeros(num_rows, np.int64)
    if window is not None:
        assert prefix.token_positions is not None
        positions = prefix.token_positions
        first = first_seen(positions, positions[start : start + num_rows], window)
    from_place = int(first[0])
    places = np.arange(from_place, start + num_rows)
    is_seen = (places >= first[:, None]) & (places < end[:, None])
    return _Sight(from_place, torch.from_numpy(is_seen))


def _question_sight(sequence: SequenceKV, num_rows: int, window: int | None) -> _Sight:
    prefix, start = sequence.prefix, sequence.num_own_tokens
    assert prefix.token_positions is not None and window is not None
    own = sequence.first_position + np.arange(start + num_rows)
    queries = own[start:]
    first = int(first_seen(prefix.token_positions, queries[:1], window)[0])
    positions = np.concatenate([prefix.token_positions[first:], own])
    ahead = queries[:, None] - positions
    return _Sight(first, torch.from_numpy((ahead >= 0) & (ahead < window)))


def _attend_prefix_by_sight(
    prefix: PrefixKV,
    layer: int,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    sight: _Sight,
) -> Tensor:
    slab = prefix.slabs[layer]
    slab.append(keys, values)
    return attend_masked(query, *slab.rows(sight.first), sight.is_seen, scaling=scaling)


def _attend_question_by_sight(
    sequence: SequenceKV,
    layer: int,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    sight: _Sight,
) -> Tensor:
    sequence.slabs[layer].append(keys, values)
    own_keys, own_values = sequence.own_rows(layer)
    prefix_keys, prefix_values = sequence.prefix.slabs[layer].rows(sight.first)
    together = torch.cat([prefix_keys, own_keys]), torch.cat([prefix_values, own_values])
    return attend_masked(query, *together, sight.is_seen, scaling=scaling)


def _own_rows_seen(sequence: SequenceKV, layer: int, window: int | None) -> tuple[Tensor, Tensor]:
    """A decode step's, with the row that it has stored."""
    keys, values = sequence.own_rows(layer)
    return (keys, values) if window is None else (keys[-window:], values[-window:])


def _first_of_prefix(sequence: SequenceKV, window: int | None) -> int:
    """From which place of its prefix on a decode step sees it."""
    if window is None:
        return 0
    positions = sequence.prefix.token_positions
    assert positions is not None
    query = np.array([sequence.first_position + sequence.num_own_tokens])
    return int(first_seen(positions, query, window)[0])
