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

from dycoke_core.engine.backends.cuda.pool import KVPool
from dycoke_core.engine.backends.cuda.seats import Seat, SeatTables
from dycoke_core.engine.backends.cuda.staging import DeviceStep, DeviceTiles, to_device
from dycoke_core.engine.backends.cuda.step_writer import StepShape, StepWriter
from dycoke_core.gpu_kernels import rows as columns
from dycoke_core.gpu_kernels.attention import merge_parts, split_attend
from dycoke_core.gpu_kernels.host_copy import gather_kept
from dycoke_core.gpu_kernels.layers import embed
from dycoke_core.gpu_kernels.sampling import SamplingScratch, sample
from dycoke_core.gpu_kernels.scoring import visual_scores
from dycoke_core.gpu_kernels.selection import gate_select
from dycoke_core.model.adapter import LayerSpec
from dycoke_core.model.fused import FusedDecoder


@dataclass(frozen=True, slots=True)
class Before:
    """Stage II's state of the rows of a step, before it."""

    rows: Tensor  # int64 [B], of the seats
    reference: Tensor
    kept: Tensor
    slots: Tensor
    refreshes: Tensor
    last_ids: Tensor


class DecodePass:
    """Args:
    host_pool: where prefixes' pruned layers may lie; None: nowhere.
    writer: of the steps that are run.
    max_rows: of the largest bucket.
    """

    def __init__(
        self,
        decoder: FusedDecoder,
        pool: KVPool,
        host_pool: KVPool | None,
        tables: SeatTables,
        writer: StepWriter,
        *,
        max_rows: int,
        layers: Sequence[LayerSpec],
    ) -> None:
        self._windowed = tuple(spec.window is not None for spec in layers)
        self._decoder, self._pool, self._host_pool = decoder, pool, host_pool
        self._tables, self.writer = tables, writer
        shape, device = pool.shape, tables.device
        num_totals = writer.max_part_rows * shape.num_kv_heads

        def empty(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self._out = empty(num_totals * shape.head_size, dtype=torch.float32)
        self._log_total = empty(num_totals, dtype=torch.float32)
        self._scores = torch.zeros(max_rows, tables.max_tokens, device=device)
        self._changed = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._results = torch.zeros(3 * max_rows, dtype=torch.int32, device=device)
        self._scratch = SamplingScratch.allocate(max_rows, len(decoder.embedding), device)

    def run(self, shape: StepShape) -> tuple[Tensor, Tensor]:
        """Launches a step of whatever was sent last.

        Returns:
            int32 [3, B]: ids, flags, refreshes; and the logits, [B, vocabulary].

        Some ten launches a layer; waits for nothing, and allocates only what lives in the step.
        """
        step = self.writer.on_device(shape)
        decoder, tables = self._decoder, self._tables
        hidden = embed(step.rows, tables.last_ids, decoder.embedding, decoder.embed_scale)
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
        rows = to_device(np.array([seat.row for seat in seats], np.int64), tables.device)
        lists = tables.slots[: (tables.num_seats + 1) * tables.max_tokens]
        return Before(
            rows,
            tables.reference.index_select(0, rows),
            tables.kept.index_select(0, rows),
            lists.view(-1, tables.max_tokens).index_select(0, rows),
            tables.refreshes.clone(),
            tables.last_ids.clone(),
        )

    def restore(self, before: Before, seats: Sequence[Seat]) -> None:
        """Undoes what a step has done to stage II. Rows of its own that it copied to a seat are
        copied again before the seat's next step, by `copy_kept`, which may fail, too."""
        tables = self._tables
        lists = tables.slots[: (tables.num_seats + 1) * tables.max_tokens]
        tables.reference.index_copy_(0, before.rows, before.reference)
        tables.kept.index_copy_(0, before.rows, before.kept)
        lists.view(-1, tables.max_tokens).index_copy_(0, before.rows, before.slots)
        tables.refreshes.copy_(before.refreshes)
        tables.last_ids.copy_(before.last_ids)
        for seat in seats:
            seat.has_stale_rows = seat.owns_kept_rows and seat.num_steps > 0

    # --- rows that lie in the host's memory ---

    def copy_text(self, seat: Seat) -> None:
        """Copies the prefix's text rows from the host into a seat's own, once per sequence."""
        stage, layout = seat.stage_two, seat.prefix.layout
        assert stage is not None
        places = np.arange(layout.num_text, dtype=np.int32)
        self._copy_rows(
            seat,
            to_device(places, self._tables.device),
            first_row=stage.num_kept,
            first_place=layout.num_visual,
        )

    def copy_kept(self, seat: Seat) -> None:
        """Copies the rows of a seat's last selection, whatever lies in their place."""
        assert seat.stage_two is not None
        kept = self._tables.kept[seat.row, : seat.stage_two.num_kept]
        self._copy_rows(seat, kept, first_row=0, first_place=0)
        seat.has_stale_rows = False

    def _copy_rows(self, seat: Seat, places: Tensor, *, first_row: int, first_place: int) -> None:
        """Args:
        places: int32 [n], in the prefix's list from `first_place` on.
        first_row: of the n in the seat's list.
        """
        assert seat.stage_two is not None
        first_layer = seat.stage_two.first_layer
        entry = np.zeros((1, columns.ROW_COLUMNS), np.int32)
        entry[:, columns.FLAGS] = columns.KEPT_IN_OWN_ROWS
        entry[:, columns.FIRST_PRUNED] = first_layer
        entry[:, columns.NUM_KEPT] = len(places)
        entry[:, columns.KEPT_FIRST] = self._tables.seat_first(seat) + first_row
        entry[:, columns.HOST_FIRST] = self._tables.host_first(seat.prefix) + first_place
        rows = to_device(entry, self._tables.device)
        self._changed.fill_(1)
        for layer in range(first_layer, self._pool.shape.num_layers):
            self._gather(rows, places[None], layer)

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


@dataclass(frozen=True, slots=True, eq=False)
class _Attention:
    """What a step's rows attend to, layer by layer."""

    owner: DecodePass
    shape: StepShape
    step: DeviceStep

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        owner, step, shape = self.owner, self.step, self.shape
        if owner._windowed[layer]:
            assert step.windows is not None
            return self._attend(layer, -1, q, step.windows)[0].flatten(1)
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

    def _attend(
        self, layer: int, list_layer: int, q: Tensor, tiles: DeviceTiles | None = None
    ) -> tuple[Tensor, Tensor]:
        """[B, H, E] and float32 [B, H]. tiles: None: the step's own."""
        owner, step, tile_rows = self.owner, self.step, self.shape.tile_rows
        tiles = tiles or step
        pool = owner._pool
        num_parts = (len(tiles.items), pool.shape.num_kv_heads, tile_rows)
        size = num_parts[0] * num_parts[1] * num_parts[2]
        out = owner._out[: size * pool.shape.head_size].view(*num_parts, pool.shape.head_size)
        log_total = owner._log_total[:size].view(num_parts)
        split_attend(
            q,
            pool.keys,
            pool.values,
            owner._tables.slots,
            tiles.items,
            tiles.num_items,
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
            tiles.parts,
            tiles.first,
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
            owner.writer.given,
            tables.refreshes,
            owner._changed[: len(rows)],
            layer=layer,
        )
