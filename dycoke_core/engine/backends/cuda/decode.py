"""One decode step of a batch: the same launches whatever it holds, so that a graph can replay them.

A step's numbers come in one upload (`staging`), its tokens stay on the device for the next step,
and what the host gets to know of it is one small download. Every tensor that a graph sees is
allocated once, here or in `SeatTables`.

A step that needs more than the usual launches runs without a graph: one that scores in another
layer than DyCoke's default, that prunes layer 0, or that is given its choice by the host. After a
failure of such a step `restore` puts stage II back as it was; a replayed graph allocates nothing
and does not fail in a way that anything survives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dycoke_core.compression.kv_pruning import RandomChoice, choose_highest, choose_lowest
from dycoke_core.config import CompressionConfig
from dycoke_core.engine.backends.cuda.pool import KVPool
from dycoke_core.engine.backends.cuda.seats import Seat, SeatTables
from dycoke_core.engine.backends.cuda.staging import (
    DeviceStep,
    HostStep,
    StepLayout,
    StepUploads,
    to_device,
)
from dycoke_core.engine.backends.cuda.tiles import (
    LARGE_TILE,
    SMALL_TILE,
    TileCapacity,
    TileRows,
    TileShape,
    choose_tile_rows,
    plan_tiles,
    sizes_of_groups,
)
from dycoke_core.engine.plan import DecodeRow
from dycoke_core.gpu_kernels import rows as columns
from dycoke_core.gpu_kernels.attention import merge_parts, split_attend
from dycoke_core.gpu_kernels.host_copy import gather_kept
from dycoke_core.gpu_kernels.layers import embed
from dycoke_core.gpu_kernels.sampling import SamplingScratch, sample
from dycoke_core.gpu_kernels.scoring import visual_scores
from dycoke_core.gpu_kernels.selection import gate_select
from dycoke_core.model.fused import FusedDecoder

USUAL_SCORING_LAYER = max(CompressionConfig().l - 1, 0)


@dataclass(frozen=True, slots=True)
class StepShape:
    """What decides a step's launches."""

    num_rows: int  # of the bucket
    tile_rows: int  # M
    scoring_layers: tuple[int, ...] = (USUAL_SCORING_LAYER,)
    prunes_layer_0: bool = False
    is_given: bool = False  # some row's choice comes from the host

    @property
    def is_usual(self) -> bool:
        return (
            set(self.scoring_layers) <= {USUAL_SCORING_LAYER}
            and not self.prunes_layer_0
            and not self.is_given
        )


@dataclass(frozen=True, slots=True)
class Before:
    """Stage II's state of the rows of a step, before it."""

    rows: Tensor  # int64 [B], of the seats
    has_selected: Tensor  # int32 [B]; the kept places of the others mean nothing
    reference: Tensor
    kept: Tensor
    slots: Tensor
    refreshes: Tensor
    last_ids: Tensor


class DecodePass:
    """Args:
    max_rows: of the largest bucket.
    host_pool: where prefixes' pruned layers may lie; None: nowhere.
    """

    def __init__(
        self,
        decoder: FusedDecoder,
        pool: KVPool,
        host_pool: KVPool | None,
        tables: SeatTables,
        *,
        max_rows: int,
        num_heads: int,
        num_axes: int,
        depth: int,
    ) -> None:
        self._decoder, self._pool, self._host_pool = decoder, pool, host_pool
        self._tables = tables
        self._num_heads, self._num_axes = num_heads, num_axes
        shape, device = pool.shape, tables.device
        layouts = {tile: self.layout(max_rows, tile) for tile in self._tiles()}
        num_words = max(layout.num_words for layout in layouts.values())
        self._uploads = StepUploads(num_words, device, depth=depth)
        largest = max(layout.capacity.items * tile for tile, layout in layouts.items())
        num_totals = largest * shape.num_kv_heads

        def empty(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self._out = empty(num_totals * shape.head_size, dtype=torch.float32)
        self._log_total = empty(num_totals, dtype=torch.float32)
        self._scores = torch.zeros(max_rows, tables.max_tokens, device=device)
        self._changed = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._given = torch.zeros(1, dtype=torch.int32, device=device)
        self._results = torch.zeros(3 * max_rows, dtype=torch.int32, device=device)
        self._scratch = SamplingScratch.allocate(max_rows, len(decoder.embedding), device)

    # --- on the host ---

    def fill(self, rows: Sequence[DecodeRow], seats: Sequence[Seat], bucket: int) -> StepShape:
        """Writes a step's numbers, in this order, and sends them."""
        tile_rows = self._tile_rows(rows, seats)
        layout = self.layout(bucket, tile_rows.m)
        step = self._uploads.begin(layout)
        given = self._fill_rows(step, rows, seats)
        step.pad(len(rows), self._pool.trash_slot)
        step.rows[len(rows) :, columns.FIRST_PRUNED] = self._pool.shape.num_layers
        tile_shape = self._tile_shape(tile_rows.m)
        plan_tiles(tile_rows.rows, tile_shape, layout.capacity).write(step)
        self._uploads.send(layout)
        if given:
            self._given = to_device(np.concatenate(given).astype(np.int32), self._tables.device)
        stages = [seat.stage_two for seat in seats if seat.stage_two is not None]
        return StepShape(
            num_rows=bucket,
            tile_rows=tile_rows.m,
            scoring_layers=tuple(sorted({stage.scoring_layer for stage in stages})),
            prunes_layer_0=any(stage.first_layer == 0 for stage in stages),
            is_given=bool(given),
        )

    def layout(self, bucket: int, tile_rows: int) -> StepLayout:
        capacity = TileCapacity.for_batch(
            bucket, self._tables.max_tokens, self._tile_shape(tile_rows)
        )
        return StepLayout(bucket, capacity, self._num_axes)

    def clear(self) -> None:
        """Makes what the device sees a step of padding, whatever its layout: all zeros are one."""
        self._uploads.clear()

    @property
    def _num_per_group(self) -> int:
        return self._num_heads // self._pool.shape.num_kv_heads

    def _tiles(self) -> list[int]:
        return [tile for tile in (SMALL_TILE, LARGE_TILE) if tile >= self._num_per_group]

    def _tile_shape(self, tile_rows: int) -> TileShape:
        shape = self._pool.shape
        return TileShape(tile_rows, self._num_per_group, shape.num_kv_heads, shape.num_layers)

    def _tile_rows(self, rows: Sequence[DecodeRow], seats: Sequence[Seat]) -> "_Reads":
        num_layers, tables = self._pool.shape.num_layers, self._tables
        reads = TileRows(
            prefix_first=_integers(tables.prefix_first(seat.prefix) for seat in seats),
            prefix_length=_integers(seat.prefix.layout.num_tokens for seat in seats),
            first_pruned=_integers(
                seat.stage_two.first_layer if seat.stage_two else num_layers for seat in seats
            ),
            seat_first=_integers(tables.seat_first(seat) for seat in seats),
            num_front=_integers(seat.num_front for seat in seats),
            num_own=_integers(row.start + 1 for row in rows),
        )
        sizes = sizes_of_groups(reads).tolist()
        return _Reads(reads, choose_tile_rows(sizes, self._num_per_group))

    def _fill_rows(
        self, step: HostStep, rows: Sequence[DecodeRow], seats: Sequence[Seat]
    ) -> list[np.ndarray]:
        """Writes each row; returns the choices that the host makes."""
        given: list[np.ndarray] = []
        num_given = 0
        for place, (row, seat) in enumerate(zip(rows, seats, strict=True)):
            entry, stage = step.rows[place], seat.stage_two
            prefix = seat.prefix
            entry[:] = 0
            entry[columns.SEAT] = seat.row
            token_id = columns.LAST_TOKEN if row.token_id is None else row.token_id
            entry[columns.TOKEN_ID] = token_id
            entry[columns.WRITE_SLOT] = slot_of(seat, row.start)
            entry[columns.FIRST_PRUNED] = self._pool.shape.num_layers
            entry[columns.SCORING_LAYER] = columns.NO_LAYER
            step.positions[:, place] = prefix.layout.next_position + row.start
            draw = row.draw
            step.temperature[place] = draw.temperature if draw is not None else 0.0
            step.top_p[place] = draw.top_p if draw is not None else 1.0
            step.uniforms[place] = draw.uniform if draw is not None else 0.0
            if stage is None:
                continue
            entry[columns.FIRST_PRUNED] = stage.first_layer
            entry[columns.SCORING_LAYER] = stage.scoring_layer
            entry[columns.NUM_VISUAL] = prefix.layout.num_visual
            entry[columns.NUM_KEPT] = stage.num_kept
            entry[columns.VISUAL_FIRST] = self._tables.prefix_first(prefix)
            entry[columns.KEPT_FIRST] = self._tables.seat_first(seat)
            threshold = np.float32(stage.threshold if stage.threshold is not None else 0.0)
            entry[columns.THRESHOLD] = threshold.view(np.int32)
            entry[columns.FLAGS] = (
                columns.FIRST_STEP * (seat.num_steps == 0)
                | columns.ONE_SHOT * (stage.threshold is None)
                | columns.KEPT_IN_OWN_ROWS * seat.owns_kept_rows
            )
            if seat.owns_kept_rows:
                entry[columns.HOST_FIRST] = self._tables.host_first(prefix)
            if stage.choose is choose_lowest:
                entry[columns.CHOICE] = columns.LOWEST
            elif isinstance(stage.choose, RandomChoice):
                entry[columns.CHOICE] = columns.GIVEN
                entry[columns.GIVEN_FIRST] = num_given
                # Drawn on the host: the choice does not look at the scores.
                blank = torch.zeros(prefix.layout.num_visual)
                given.append(stage.choose(blank, stage.num_kept, seat.num_steps).numpy())
                num_given += stage.num_kept
            else:
                assert stage.choose is choose_highest, "a choice that no kernel makes"
        return given

    # --- on the device ---

    def run(self, shape: StepShape) -> tuple[Tensor, Tensor]:
        """Launches a step of whatever was sent last.

        Returns:
            int32 [3, B]: ids, flags, refreshes; and the logits, [B, vocabulary].

        Some ten launches a layer; waits for nothing, and allocates only what lives in the step.
        """
        step = self._uploads.device_step(self.layout(shape.num_rows, shape.tile_rows))
        decoder, tables = self._decoder, self._tables
        hidden = embed(step.rows, tables.last_ids, decoder.embedding)
        cos, sin = decoder.rotary(step.positions)
        hidden = decoder.run(
            hidden,
            cos,
            sin,
            step.rows[:, columns.WRITE_SLOT],
            self._pool.keys,
            self._pool.values,
            _Attention(self, shape, step),
        )
        logits = decoder.logits(hidden)
        results = self._results[: 3 * shape.num_rows].view(3, shape.num_rows)
        seats = step.rows[:, columns.SEAT]
        sample(
            logits,
            step.temperature,
            step.top_p,
            step.uniforms,
            step.rows,
            tables.last_ids,
            results[0],
            results[1],
            self._scratch,
        )
        torch.index_select(tables.refreshes, 0, seats, out=results[2])
        return results, logits

    # --- failures ---

    def remember(self, seats: Sequence[Seat]) -> Before:
        tables = self._tables
        rows = to_device(_integers(seat.row for seat in seats), tables.device)
        lists = tables.slots[: (tables.num_seats + 1) * tables.max_tokens]
        return Before(
            rows,
            to_device(np.array([seat.num_steps > 0 for seat in seats], np.int32), tables.device),
            tables.reference.index_select(0, rows),
            tables.kept.index_select(0, rows),
            lists.view(-1, tables.max_tokens).index_select(0, rows),
            tables.refreshes.clone(),
            tables.last_ids.clone(),
        )

    def restore(self, before: Before, seats: Sequence[Seat], shape: StepShape) -> None:
        """Undoes what a step has done to stage II, and to the rows of its own that it copied."""
        tables = self._tables
        lists = tables.slots[: (tables.num_seats + 1) * tables.max_tokens]
        tables.reference.index_copy_(0, before.rows, before.reference)
        tables.kept.index_copy_(0, before.rows, before.kept)
        lists.view(-1, tables.max_tokens).index_copy_(0, before.rows, before.slots)
        tables.refreshes.copy_(before.refreshes)
        tables.last_ids.copy_(before.last_ids)
        if any(seat.owns_kept_rows and seat.num_steps for seat in seats):
            self._changed.zero_()
            self._changed[: len(seats)].copy_(before.has_selected)
            step = self._uploads.device_step(self.layout(shape.num_rows, shape.tile_rows))
            for layer in range(self._pool.shape.num_layers):
                self._gather(step.rows, self._tables.kept, layer)

    # --- rows that lie in the host's memory ---

    def copy_text(self, seat: Seat) -> None:
        """Copies the prefix's text rows from the host into a seat's own, once per sequence."""
        stage, layout = seat.stage_two, seat.prefix.layout
        assert stage is not None
        entry = np.zeros((1, columns.ROW_COLUMNS), np.int32)
        entry[:, columns.FLAGS] = columns.KEPT_IN_OWN_ROWS
        entry[:, columns.FIRST_PRUNED] = stage.first_layer
        entry[:, columns.NUM_KEPT] = layout.num_text
        entry[:, columns.KEPT_FIRST] = self._tables.seat_first(seat) + stage.num_kept
        entry[:, columns.HOST_FIRST] = self._tables.host_first(seat.prefix) + layout.num_visual
        rows = to_device(entry, self._tables.device)
        every_place = to_device(np.arange(layout.num_text, dtype=np.int32), self._tables.device)
        self._changed.fill_(1)
        for layer in range(stage.first_layer, self._pool.shape.num_layers):
            self._gather(rows, every_place[None], layer)

    def _gather(self, rows: Tensor, kept: Tensor, layer: int) -> None:
        assert self._host_pool is not None
        gather_kept(
            self._host_pool.keys,
            self._host_pool.values,
            self._pool.keys,
            self._pool.values,
            rows,
            kept,
            self._changed[: len(rows)],
            self._tables.host_slots,
            self._tables.slots,
            layer=layer,
        )


@dataclass(frozen=True, slots=True)
class _Reads:
    rows: TileRows
    m: int


@dataclass(frozen=True, slots=True, eq=False)
class _Attention:
    """What a step's rows attend to, layer by layer."""

    owner: DecodePass
    shape: StepShape
    step: DeviceStep

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        owner, step, shape = self.owner, self.step, self.shape
        if layer == 0 and shape.prunes_layer_0:
            _, total = self._attend(layer, -1, q)  # everything, to score before pruning
            self._select(layer, q, total)
            if owner._host_pool is not None:
                owner._gather(step.rows, owner._tables.kept, layer)
            return self._attend(layer, layer, q)[0].flatten(1)
        if layer and owner._host_pool is not None:
            owner._gather(step.rows, owner._tables.kept, layer)
        output, total = self._attend(layer, layer, q)
        if layer in shape.scoring_layers:
            self._select(layer, q, total)
        return output.flatten(1)

    def _attend(self, layer: int, list_layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, E] and float32 [B, H]."""
        owner, step, tile_rows = self.owner, self.step, self.shape.tile_rows
        pool = owner._pool
        num_parts = (len(step.items), pool.shape.num_kv_heads, tile_rows)
        size = num_parts[0] * num_parts[1] * num_parts[2]
        out = owner._out[: size * pool.shape.head_size].view(*num_parts, pool.shape.head_size)
        log_total = owner._log_total[:size].view(num_parts)
        split_attend(
            q,
            pool.keys,
            pool.values,
            owner._tables.slots,
            step.items,
            step.num_items,
            out,
            log_total,
            layer=layer,
            list_layer=list_layer,
            scaling=owner._decoder.scaling,
            tile_rows=tile_rows,
        )
        output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        total = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        merge_parts(
            out,
            log_total,
            step.parts,
            step.first,
            step.rows,
            output,
            total,
            list_layer=list_layer,
            tile_rows=tile_rows,
        )
        return output, total

    def _select(self, layer: int, q: Tensor, total: Tensor) -> None:
        owner, rows = self.owner, self.step.rows
        tables, scores = owner._tables, owner._scores[: len(rows)]
        visual_scores(
            q,
            owner._pool.keys,
            tables.slots,
            rows,
            total,
            scores,
            layer=layer,
            scaling=owner._decoder.scaling,
        )
        gate_select(
            rows,
            scores,
            tables.reference,
            tables.kept,
            tables.slots,
            owner._given,
            tables.refreshes,
            owner._changed[: len(rows)],
            layer=layer,
        )


def slot_of(seat: Seat, index: int) -> int:
    """Slot of a seat's own token."""
    page, place = divmod(index, columns.PAGE)
    return int(seat.own.page_rows[page]) - seat.own.first_layer * columns.PAGE + place


def _integers(values: object) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)  # type: ignore[call-overload, no-any-return]
