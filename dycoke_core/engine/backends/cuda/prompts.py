"""The eager pass of prompts: chunks of prefixes, and of the questions after them.

All rows go through the layers together. A prefix's chunk attends to itself causally through
PyTorch's fused kernels, and to the rows before it in another part; a question's rows read their
slots as decode rows do, so that many questions about a video read it once. Where a prefix's pruned
layers lie in host memory, questions read those over the bus, in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dycoke_core.engine.backend import PrefixChunk, QuestionChunk
from dycoke_core.engine.backends.cuda.pool import KVPool
from dycoke_core.engine.backends.cuda.seats import Prefix, Seat, SeatTables
from dycoke_core.engine.backends.cuda.staging import to_device
from dycoke_core.engine.backends.cuda.tiles import (
    TileCapacity,
    TileRows,
    Tiles,
    TileShape,
    choose_tile_rows,
    plan_tiles,
    sizes_of_groups,
)
from dycoke_core.engine.backends.cuda.windows import rows_in_windows, seat_window
from dycoke_core.engine.partial_attention import (
    attend,
    attend_causally,
    attend_masked,
    merge,
    pack_queries,
    unpack_rows,
)
from dycoke_core.engine.sight import end_seen, first_seen, window_of
from dycoke_core.gpu_kernels import rows as columns
from dycoke_core.gpu_kernels.attention import merge_parts, split_attend
from dycoke_core.gpu_kernels.layers import embed
from dycoke_core.gpu_kernels.sampling import SamplingScratch, sample
from dycoke_core.model.adapter import LayerSpec
from dycoke_core.model.fused import FusedDecoder


@dataclass(frozen=True, slots=True, eq=False)
class _Reads:
    """Which slots the questions' rows read, and in which pool."""

    pool: KVPool
    slots: Tensor
    tiles: Tiles
    shape: TileShape
    items: Tensor
    num_items: Tensor
    parts: Tensor
    first: Tensor
    rows: Tensor  # ROWS, by which `merge_parts` knows a row's side
    first_layer: int = 0  # below it there is nothing to read


@dataclass(frozen=True, slots=True, eq=False)
class _Sight:
    """What the rows of a prefix's chunk see where it is not simply all before them.

    Args:
        slots: int64 [keys], of the tokens from the first on that one of them sees.
        is_seen: bool [rows, keys].
    """

    slots: Tensor
    is_seen: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _PrefixRows:
    """A chunk of a prefix among the pass's rows. earlier: slots of the tokens before it, int64.

    whole, windowed: in layers that have no window, and in those that have one; None: all before.
    """

    rows: slice
    earlier: Tensor
    whole: _Sight | None
    windowed: _Sight | None


class PromptPass:
    def __init__(
        self,
        decoder: FusedDecoder,
        pool: KVPool,
        host_pool: KVPool | None,
        tables: SeatTables,
        *,
        layers: Sequence[LayerSpec],
        num_heads: int,
        num_axes: int,
    ) -> None:
        self._window = window_of(layers)
        self._windowed = tuple(spec.window is not None for spec in layers)
        self._decoder, self._pool, self._host_pool = decoder, pool, host_pool
        self._tables = tables
        self._num_heads, self._num_axes = num_heads, num_axes

    def run(
        self,
        prefixes: Sequence[tuple[PrefixChunk, Prefix]],
        questions: Sequence[tuple[QuestionChunk, Seat]],
    ) -> tuple[Tensor, Tensor]:
        """Launches a pass. Changes nothing but rows of the pool that were not in use yet.

        Returns:
            int32 [3, n]: ids, flags and zeros, for each question chunk that draws; and their
            logits, [n, vocabulary].
        """
        device, decoder = self._tables.device, self._decoder
        embeds, positions, write_slots, layer_adds = [], [], [], []
        chunks: list[_PrefixRows] = []
        num_rows = 0
        for chunk, prefix in prefixes:
            assert prefix.embeds is not None and prefix.positions is not None
            assert prefix.write_slots is not None
            end = chunk.start + chunk.size
            embeds.append(prefix.embeds[chunk.start : end])
            positions.append(prefix.positions[:, chunk.start : end])
            if prefix.layer_adds is not None:
                layer_adds.append(prefix.layer_adds[:, chunk.start : end])
            write_slots.append(prefix.write_slots[chunk.start : end])
            chunks.append(self._prefix_rows(chunk, prefix, num_rows))
            num_rows += chunk.size
        table = self._rows(questions)
        reads: list[_Reads] = []
        in_windows: _Reads | None = None
        if questions:
            rows = to_device(table, device)
            reads = self._reads(questions, table, rows)
            if self._window is not None:
                in_windows = self._reads_in_windows(questions, rows, self._window)
            scale = decoder.embed_scale
            embeds.append(embed(rows, self._tables.last_ids, decoder.embedding, scale))
            own = to_device(self._positions(questions), device)
            positions.append(own.expand(self._num_axes, -1))
            write_slots.append(rows[:, columns.WRITE_SLOT])
        hidden = decoder.run(
            torch.cat(embeds),
            *decoder.rotary(torch.cat(positions, dim=1)),
            torch.cat(write_slots),
            self._pool.keys,
            self._pool.values,
            _Attention(self, chunks, slice(num_rows, None), reads, in_windows),
            layer_adds=torch.cat(layer_adds, dim=1) if layer_adds else None,
        )
        return self._draw(hidden, table, num_rows, questions)

    def _draw(
        self,
        hidden: Tensor,
        table: np.ndarray,
        first_row: int,
        questions: Sequence[tuple[QuestionChunk, Seat]],
    ) -> tuple[Tensor, Tensor]:
        device, decoder = self._tables.device, self._decoder
        ends = np.cumsum([len(chunk.token_ids) for chunk, _ in questions], dtype=np.int64)
        drawn = [(chunk, place) for place, (chunk, _) in enumerate(questions) if chunk.draw]
        last_rows = ends[[place for _, place in drawn]] - 1 if drawn else ends[:0]
        logits = decoder.logits(hidden.index_select(0, to_device(first_row + last_rows, device)))
        results = torch.zeros((3, len(drawn)), dtype=torch.int32, device=device)
        if drawn:
            draws = [draw for chunk, _ in drawn if (draw := chunk.draw) is not None]
            sample(
                logits,
                to_device(np.array([d.temperature for d in draws], np.float32), device),
                to_device(np.array([d.top_p for d in draws], np.float32), device),
                to_device(np.array([d.uniform for d in draws], np.float64), device),
                to_device(table[last_rows], device),
                self._tables.last_ids,
                results[0],
                results[1],
                SamplingScratch.allocate(len(drawn), logits.shape[1], device),
            )
        return results, logits

    # --- on the host ---

    def _prefix_rows(self, chunk: PrefixChunk, prefix: Prefix, first_row: int) -> _PrefixRows:
        assert prefix.write_slots is not None
        whole = windowed = None
        if prefix.whole_runs:
            whole = self._sight(chunk, prefix, None)
        if self._window is not None:
            windowed = self._sight(chunk, prefix, self._window)
        earlier = prefix.write_slots[: chunk.start].long()
        return _PrefixRows(slice(first_row, first_row + chunk.size), earlier, whole, windowed)

    def _sight(self, chunk: PrefixChunk, prefix: Prefix, window: int | None) -> _Sight:
        device, end = self._tables.device, chunk.start + chunk.size
        first = np.zeros(chunk.size, np.int64)
        if window is not None:
            assert prefix.token_positions is not None
            positions = prefix.token_positions
            first = first_seen(positions, positions[chunk.start : end], window)
        firsts = to_device(first, device)[:, None]
        ends = to_device(end_seen(chunk.start, chunk.size, prefix.whole_runs), device)[:, None]
        places = torch.arange(int(first[0]), end, device=device)
        assert prefix.write_slots is not None
        slots = prefix.write_slots[int(first[0]) : end].long()
        return _Sight(slots, (places >= firsts) & (places < ends))

    def _rows(self, questions: Sequence[tuple[QuestionChunk, Seat]]) -> np.ndarray:
        """ROWS of all questions' tokens."""
        num_rows = sum(len(chunk.token_ids) for chunk, _ in questions)
        table = np.zeros((num_rows, columns.ROW_COLUMNS), np.int32)
        start = 0
        for chunk, seat in questions:
            size = len(chunk.token_ids)
            entry = table[start : start + size]
            entry[:, columns.SEAT] = seat.row
            entry[:, columns.TOKEN_ID] = chunk.token_ids
            entry[:, columns.WRITE_SLOT] = seat.own.slots()[chunk.start : chunk.start + size]
            entry[:, columns.FIRST_PRUNED] = self._first_host_layer(seat)
            entry[:, columns.SCORING_LAYER] = columns.NO_LAYER
            start += size
        return table

    def _first_host_layer(self, seat: Seat) -> int:
        """From here on the question's prefix is read from the host; T: it is on the device."""
        if seat.prefix.host_extent is None:
            return self._pool.shape.num_layers
        return seat.prefix.layout.first_host_layer

    def _positions(self, questions: Sequence[tuple[QuestionChunk, Seat]]) -> np.ndarray:
        """int64 [rows]; a question's tokens have the same position on every axis."""
        runs = []
        for chunk, seat in questions:
            first = seat.prefix.layout.next_position + chunk.start
            runs.append(np.arange(first, first + len(chunk.token_ids)))
        return np.concatenate(runs)

    def _reads(
        self, questions: Sequence[tuple[QuestionChunk, Seat]], table: np.ndarray, rows: Tensor
    ) -> list[_Reads]:
        """What lies on the device, and, where some of it does, what lies in the host's memory."""
        tables = self._tables
        sizes = [len(chunk.token_ids) for chunk, _ in questions]

        def per_row(values: Sequence[int]) -> np.ndarray:
            return np.repeat(np.array(values, np.int64), sizes)

        seats = [seat for _, seat in questions]
        num_own = np.concatenate(
            [chunk.start + 1 + np.arange(len(chunk.token_ids)) for chunk, _ in questions]
        )
        own_first = [tables.seat_first(seat) + seat.num_front for seat in seats]
        on_device = TileRows(
            prefix_first=per_row([tables.prefix_first(seat.prefix) for seat in seats]),
            prefix_length=per_row([seat.prefix.layout.num_tokens for seat in seats]),
            # Above, where the prefix is not on the device, rows read their own part alone.
            first_pruned=per_row([self._first_host_layer(seat) for seat in seats]),
            seat_first=per_row(own_first),
            num_front=per_row([0] * len(seats)),
            num_own=num_own,
        )
        reads = [self._read(on_device, self._pool, tables.slots, rows)]
        if any(seat.prefix.host_extent is not None for seat in seats):
            reads.append(self._host_reads(on_device, table, seats, per_row))
        return reads

    def _reads_in_windows(
        self, questions: Sequence[tuple[QuestionChunk, Seat]], rows: Tensor, window: int
    ) -> _Reads:
        of_rows = [
            seat_window(seat, self._tables, index, window)
            for chunk, seat in questions
            for index in range(chunk.start, chunk.start + len(chunk.token_ids))
        ]
        in_windows = rows_in_windows(of_rows, self._pool.shape.num_layers)
        return self._read(in_windows, self._pool, self._tables.slots, rows)

    def _host_reads(
        self,
        on_device: TileRows,
        table: np.ndarray,
        seats: Sequence[Seat],
        per_row: Callable[[Sequence[int]], np.ndarray],
    ) -> _Reads:
        """The same prefixes in the host's pool, from each one's first host layer on."""
        assert self._host_pool is not None
        tables, num_layers = self._tables, self._pool.shape.num_layers
        extents = [seat.prefix.host_extent for seat in seats]
        firsts = [
            tables.host_first(seat.prefix) if seat.prefix.host_extent is not None else 0
            for seat in seats
        ]
        lengths = [0 if extent is None else extent.num_tokens for extent in extents]
        nothing = np.zeros(len(on_device), np.int64)
        reads = self._read(
            TileRows(
                prefix_first=per_row(firsts),
                prefix_length=per_row(lengths),
                first_pruned=nothing + num_layers,
                seat_first=nothing,
                num_front=nothing,
                num_own=nothing,
            ),
            self._host_pool,
            tables.host_slots,
            to_device(_with_first_pruned(table, num_layers), tables.device),
        )
        items = reads.tiles.items
        items[:, columns.FIRST_LAYER] = on_device.first_pruned[items[:, columns.FIRST_ROW]]
        return replace(
            reads,
            items=to_device(items, tables.device),
            first_layer=int(items[:, columns.FIRST_LAYER].min(initial=num_layers)),
        )

    def _read(self, rows: TileRows, pool: KVPool, slots: Tensor, table: Tensor) -> _Reads:
        num_per_group = self._num_heads // pool.shape.num_kv_heads
        tile_rows = choose_tile_rows(sizes_of_groups(rows).tolist(), num_per_group)
        shape = TileShape(tile_rows, num_per_group, pool.shape.num_kv_heads, pool.shape.num_layers)
        capacity = TileCapacity.for_batch(len(rows), self._tables.max_tokens, shape)
        tiles = plan_tiles(rows, shape, capacity)
        device = self._tables.device
        return _Reads(
            pool,
            slots,
            tiles,
            shape,
            items=to_device(tiles.items, device),
            num_items=to_device(np.array([len(tiles.items)], np.int32), device),
            parts=to_device(tiles.parts, device),
            first=to_device(tiles.first, device),
            rows=table,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Attention:
    owner: PromptPass
    chunks: Sequence[_PrefixRows]
    questions: slice  # their rows, after the chunks'
    reads: Sequence[_Reads]
    in_windows: _Reads | None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for chunk in self.chunks:
            output[chunk.rows] = self._attend_prefix(
                chunk, layer, q[chunk.rows], k[chunk.rows], v[chunk.rows]
            )
        if self.reads:
            output[self.questions] = self._attend_questions(layer, q[self.questions])
        return output.flatten(1)

    def _attend_prefix(
        self, chunk: _PrefixRows, layer: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        owner = self.owner
        scaling = owner._decoder.scaling
        sight = chunk.windowed if owner._windowed[layer] else chunk.whole
        if sight is not None:  # keys and values are stored by now
            places = sight.slots + layer * columns.PAGE
            keys = owner._pool.keys.index_select(0, places)
            values = owner._pool.values.index_select(0, places)
            return attend_masked(q, keys, values, sight.is_seen, scaling=scaling)
        partial = attend_causally(q.contiguous(), k, v, scaling=scaling)
        if len(chunk.earlier):
            places = chunk.earlier + layer * columns.PAGE
            keys = owner._pool.keys.index_select(0, places)
            values = owner._pool.values.index_select(0, places)
            packed = pack_queries(q.contiguous(), k.shape[1])
            partial = merge(attend(packed, keys, values, scaling=scaling), partial)
        return unpack_rows(partial.output, len(q))

    def _attend_questions(self, layer: int, q: Tensor) -> Tensor:
        if self.owner._windowed[layer]:
            assert self.in_windows is not None
            return self._part(self.in_windows, layer, q, list_layer=-1)[0]
        here, *elsewhere = self.reads
        output, total = self._part(here, layer, q)
        for reads in elsewhere:
            if layer < reads.first_layer:
                continue
            more, more_total = self._part(reads, layer, q)
            share = (more_total - torch.logaddexp(total, more_total)).exp()[..., None]
            joint = torch.lerp(output.float(), more.float(), share).to(output.dtype)
            # Parts of a prefix whose first host layer is above this one hold something else.
            is_elsewhere = (here.rows[:, columns.FIRST_PRUNED] <= layer)[:, None, None]
            output = torch.where(is_elsewhere, joint, output)
        return output

    def _part(
        self, reads: _Reads, layer: int, q: Tensor, list_layer: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Args: list_layer: by which items are chosen; None: the layer."""
        shape = reads.shape
        list_layer = layer if list_layer is None else list_layer
        sizes = (len(reads.items), shape.num_kv_heads, shape.tile_rows)
        out = torch.empty((*sizes, q.shape[2]), device=q.device)
        log_total = torch.empty(sizes, device=q.device)
        split_attend(
            q,
            reads.pool.keys,
            reads.pool.values,
            reads.slots,
            reads.items,
            reads.num_items,
            out,
            log_total,
            layer=layer,
            list_layer=list_layer,
            scaling=self.owner._decoder.scaling,
            tile_rows=shape.tile_rows,
        )
        output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        total = torch.empty(q.shape[:2], device=q.device)
        merge_parts(
            out,
            log_total,
            reads.parts,
            reads.first,
            reads.rows,
            output,
            total,
            list_layer=list_layer,
            tile_rows=shape.tile_rows,
        )
        return output, total


def _with_first_pruned(table: np.ndarray, layer: int) -> np.ndarray:
    changed = table.copy()
    changed[:, columns.FIRST_PRUNED] = layer
    return changed
