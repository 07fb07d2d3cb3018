"""A decode step's numbers, written by the host and sent in one upload.

Knows the columns of ROWS, which slots each row reads and which bucket the step is padded to; runs
nothing. What stays the same over a sequence's steps is kept as a finished row on its seat, and a
step fills in the rest: 0.6 ms for 64 rows on one core of a small cloud machine, tiles included.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dycoke_core.compression.kv_pruning import (
    RandomChoice,
    StageTwo,
    choose_highest,
    choose_lowest,
)
from dycoke_core.config import CompressionConfig
from dycoke_core.engine.backend import DecodeRow
from dycoke_core.engine.backends.cuda.pool import KVPool
from dycoke_core.engine.backends.cuda.seats import Int32s, Seat, SeatTables
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
from dycoke_core.engine.backends.cuda.windows import rows_in_windows, seat_window
from dycoke_core.engine.sampler import Draw
from dycoke_core.engine.sight import window_of
from dycoke_core.gpu_kernels import rows as columns
from dycoke_core.model.adapter import LayerSpec

_FORCED = Draw(0.0, 1.0, 0.0)  # of rows whose token is known: what they draw is not looked at


@dataclass(frozen=True, slots=True)
class StepShape:
    """What decides a step's launches."""

    num_rows: int  # of the bucket
    tile_rows: int  # M
    scoring_layers: tuple[int, ...]
    usual_scoring_layer: int  # that graphs score in
    prunes_layer_0: bool = False
    is_given: bool = False  # some row's choice comes from the host

    @property
    def is_usual(self) -> bool:
        return (
            set(self.scoring_layers) <= {self.usual_scoring_layer}
            and not self.prunes_layer_0
            and not self.is_given
        )


class StepWriter:
    """Args:
    max_rows: of the largest bucket.
    layers: of the model.
    depth: steps that may be in flight while the next one is written.
    """

    def __init__(
        self,
        pool: KVPool,
        tables: SeatTables,
        *,
        max_rows: int,
        layers: Sequence[LayerSpec],
        num_heads: int,
        num_axes: int,
        depth: int,
    ) -> None:
        self._window = window_of(layers)
        self._usual_scoring_layer = _usual_scoring_layer(layers)
        self._pool, self._tables = pool, tables
        self._num_per_group = num_heads // pool.shape.num_kv_heads
        self._num_axes = num_axes
        tiles = [tile for tile in (SMALL_TILE, LARGE_TILE) if tile >= self._num_per_group]
        layouts = {tile: self._layout(max_rows, tile) for tile in tiles}
        num_words = max(layout.num_words for layout in layouts.values())
        self.max_part_rows = max(layouts[tile].capacity.items * tile for tile in tiles)
        self._uploads = StepUploads(num_words, tables.device, depth=depth)
        self.given = torch.zeros(1, dtype=torch.int32, device=tables.device)

    def write(self, rows: Sequence[DecodeRow], seats: Sequence[Seat], bucket: int) -> StepShape:
        """Writes a step, its rows in this order, and sends it."""
        reads = self._reads(rows, seats)
        tile_rows = choose_tile_rows(sizes_of_groups(reads).tolist(), self._num_per_group)
        layout = self._layout(bucket, tile_rows)
        step = self._uploads.begin(layout)
        given = self._write_rows(step, rows, seats)
        step.pad(len(rows), self._pool.trash_slot)
        step.rows[len(rows) :, columns.FIRST_PRUNED] = self._pool.shape.num_layers
        tile_shape = self._tile_shape(tile_rows)
        plan_tiles(reads, tile_shape, layout.capacity).write(step)
        if step.windows is not None and self._window is not None:
            in_windows = self._reads_in_windows(rows, seats, self._window)
            plan_tiles(in_windows, tile_shape, layout.capacity).write(step.windows)
        self._uploads.send(layout)
        if given:
            self.given = to_device(np.concatenate(given).astype(np.int32), self._tables.device)
        stages = [seat.stage_two for seat in seats if seat.stage_two is not None]
        return StepShape(
            num_rows=bucket,
            tile_rows=tile_rows,
            scoring_layers=tuple(sorted({stage.scoring_layer for stage in stages})),
            usual_scoring_layer=self._usual_scoring_layer,
            prunes_layer_0=any(stage.first_layer == 0 for stage in stages),
            is_given=bool(given),
        )

    def usual_shape(self, num_rows: int, tile_rows: int) -> StepShape:
        """Of a step that scores where DyCoke's default does."""
        usual = self._usual_scoring_layer
        return StepShape(num_rows, tile_rows, (usual,), usual)

    def clear(self) -> None:
        """Makes what the device sees a step of padding, whatever its layout: all zeros are one."""
        self._uploads.clear()

    def on_device(self, shape: StepShape) -> DeviceStep:
        """Where the device finds a step of this shape; always the same memory."""
        return self._uploads.device_step(self._layout(shape.num_rows, shape.tile_rows))

    def _layout(self, bucket: int, tile_rows: int) -> StepLayout:
        shape = self._tile_shape(tile_rows)
        capacity = TileCapacity.for_batch(bucket, self._tables.max_tokens, shape)
        return StepLayout(bucket, capacity, self._num_axes, self._window is not None)

    def _tile_shape(self, tile_rows: int) -> TileShape:
        shape = self._pool.shape
        return TileShape(tile_rows, self._num_per_group, shape.num_kv_heads, shape.num_layers)

    def _reads(self, rows: Sequence[DecodeRow], seats: Sequence[Seat]) -> TileRows:
        num_layers, tables = self._pool.shape.num_layers, self._tables
        return TileRows(
            prefix_first=_integers(tables.prefix_first(seat.prefix) for seat in seats),
            prefix_length=_integers(seat.prefix.layout.num_tokens for seat in seats),
            first_pruned=_integers(
                seat.stage_two.first_layer if seat.stage_two else num_layers for seat in seats
            ),
            seat_first=_integers(tables.seat_first(seat) for seat in seats),
            num_front=_integers(seat.num_front for seat in seats),
            num_own=_integers(row.start + 1 for row in rows),
        )

    def _reads_in_windows(
        self, rows: Sequence[DecodeRow], seats: Sequence[Seat], window: int
    ) -> TileRows:
        """The end of the prefix, in the order of its tokens, and the end of the own part."""
        of_rows = [
            seat_window(seat, self._tables, row.start, window)
            for row, seat in zip(rows, seats, strict=True)
        ]
        return rows_in_windows(of_rows, self._pool.shape.num_layers)

    def _write_rows(
        self, step: HostStep, rows: Sequence[DecodeRow], seats: Sequence[Seat]
    ) -> list[npt.NDArray[np.int64]]:
        """Returns the choices that the host makes, for the rows that have one."""
        num_rows = len(rows)
        table = step.rows[:num_rows]
        table[:] = [self._unchanging(seat) for seat in seats]
        table[:, columns.TOKEN_ID] = [
            columns.LAST_TOKEN if row.token_id is None else row.token_id for row in rows
        ]
        table[:, columns.WRITE_SLOT] = [
            slot_of(seat, row.start) for row, seat in zip(rows, seats, strict=True)
        ]
        is_first = [columns.FIRST_STEP * (seat.num_steps == 0) for seat in seats]
        table[:, columns.FLAGS] |= np.array(is_first, np.int32)
        firsts = [seat.prefix.layout.next_position for seat in seats]
        step.positions[:, :num_rows] = _integers(row.start for row in rows) + np.array(firsts)
        draws = [row.draw or _FORCED for row in rows]
        step.temperature[:num_rows] = [draw.temperature for draw in draws]
        step.top_p[:num_rows] = [draw.top_p for draw in draws]
        step.uniforms[:num_rows] = [draw.uniform for draw in draws]
        return _write_choices(table, seats)

    def _unchanging(self, seat: Seat) -> Int32s:
        """A seat's row but for what changes from step to step."""
        if seat.step_row is None:
            seat.step_row = self._make_row(seat)
        return seat.step_row

    def _make_row(self, seat: Seat) -> Int32s:
        row = np.zeros(columns.ROW_COLUMNS, np.int32)
        row[columns.SEAT] = seat.row
        row[columns.FIRST_PRUNED] = self._pool.shape.num_layers
        row[columns.SCORING_LAYER] = columns.NO_LAYER
        stage, prefix = seat.stage_two, seat.prefix
        if stage is None:
            return row
        row[columns.FIRST_PRUNED] = stage.first_layer
        row[columns.SCORING_LAYER] = stage.scoring_layer
        row[columns.NUM_VISUAL] = prefix.layout.num_visual
        row[columns.NUM_KEPT] = stage.num_kept
        row[columns.VISUAL_FIRST] = self._tables.prefix_first(prefix)
        row[columns.KEPT_FIRST] = self._tables.seat_first(seat)
        row[columns.FLAGS] = (
            columns.ONE_SHOT * (stage.threshold is None)
            | columns.KEPT_IN_OWN_ROWS * seat.owns_kept_rows
        )
        if stage.threshold is not None:
            row[columns.THRESHOLD] = np.float32(stage.threshold).view(np.int32)
        if seat.owns_kept_rows:
            row[columns.HOST_FIRST] = self._tables.host_first(prefix)
        if stage.choose is choose_lowest:
            row[columns.CHOICE] = columns.LOWEST
        elif isinstance(stage.choose, RandomChoice):
            row[columns.CHOICE] = columns.GIVEN
        else:
            assert stage.choose is choose_highest, "a choice that no kernel makes"
        return row


def _usual_scoring_layer(layers: Sequence[LayerSpec]) -> int:
    full_layers = [layer for layer, spec in enumerate(layers) if spec.window is None]
    usual = StageTwo(CompressionConfig().l, num_kept=0, threshold=None)
    usual_here = usual.in_layers(full_layers, len(layers))
    return (usual_here or usual).scoring_layer


def _write_choices(table: Int32s, seats: Sequence[Seat]) -> list[npt.NDArray[np.int64]]:
    """Draws for the rows whose choice looks at no score, and says where each one's begins."""
    given: list[npt.NDArray[np.int64]] = []
    num_given = 0
    for entry, seat in zip(table, seats, strict=True):
        stage = seat.stage_two
        if stage is None or not isinstance(stage.choose, RandomChoice):
            continue
        blank: Tensor = torch.zeros(seat.prefix.layout.num_visual)
        given.append(stage.choose(blank, stage.num_kept, seat.num_steps).numpy())
        entry[columns.GIVEN_FIRST] = num_given
        num_given += stage.num_kept
    return given


def slot_of(seat: Seat, index: int) -> int:
    """Slot of a seat's own token."""
    page, place = divmod(index, columns.PAGE)
    return int(seat.own.page_rows[page]) - seat.own.first_layer * columns.PAGE + place


def _integers(values: Iterable[int]) -> npt.NDArray[np.int64]:
    return np.fromiter(values, dtype=np.int64)
