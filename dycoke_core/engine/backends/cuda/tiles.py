"""Which rows of a step read which slots, cut into work items that keep a whole device busy.

A row's lists, by side: below its first pruned layer L (the *low* side) the prefix, which it may
share with other rows, and its seat's own part; from L on (*high*) the seat's whole list
`[kept | prefix text | own]`. A *unit* is one list read by up to M // R neighbouring rows: those
that share a prefix, or the consecutive rows of one question, each of which sees one own slot more
than the one before. A unit is split along its slots into items of about equal length.

The split length is chosen per side as the shortest multiple of 64, from 256 on, with which the
items fit their number's limit: many short items for a small batch, which would otherwise leave the
device idle, and few long ones for a large batch, where programs that do nothing would cost time.
A grid is fixed when it is captured, so the limit must never be exceeded, and is not: with a split
as long as the longest list there is one item per unit, of which a batch of B rows has at most 2 B
on the low side and B on the high side, and `TileCapacity.for_batch` has room for these.

Knows slot lists by offset and length in SLOTS alone. The columns of ITEMS are those of
`dycoke_core.gpu_kernels.rows`. All is numpy on the host: 0.16 ms a step for one row, 0.22 ms for 64
and 0.31 ms for 256, on one core of a small cloud machine (7B's heads, prefixes of 3,000 tokens).

What is not covered: which split length is best on a device; the constants here are computed from
its number of multiprocessors, not measured.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dycoke_core.gpu_kernels.rows import (
    CAUSAL,
    END_LAYER,
    FIRST_LAYER,
    FIRST_ROW,
    FIRST_SLOT,
    ITEM_COLUMNS,
    NUM_ROWS,
    NUM_SLOTS,
)

SPLIT_STEP = 64  # slots that a program reads at once
MIN_SPLIT = 256  # shorter ones spend more on parts than they gain
SMALL_TILE, LARGE_TILE = 16, 64  # M
# Programs that fill an H200 three times over: 132 multiprocessors, five programs of M = 16 on each.
NUM_PROGRAMS = 2048

Integers = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TileShape:
    """What a launch of `split_attend` fixes."""

    tile_rows: int  # M, rows of the matrix that one program multiplies
    num_heads_per_group: int  # R = H / G
    num_kv_heads: int  # G
    num_layers: int  # T

    def __post_init__(self) -> None:
        if self.num_heads_per_group > self.tile_rows:
            raise ValueError(f"{self.num_heads_per_group} heads per group exceed a tile")

    @property
    def rows_per_item(self) -> int:
        """Tokens whose query heads of one group fit a tile."""
        return self.tile_rows // self.num_heads_per_group

    @property
    def num_spare_items(self) -> int:
        """To be had by splitting, beyond one per unit."""
        return max(NUM_PROGRAMS // self.num_kv_heads, 1)


@dataclass(frozen=True, slots=True)
class TileCapacity:
    """Limits of a bucket, which every step's tiles keep."""

    low_items: int
    high_items: int
    parts: int

    @classmethod
    def for_batch(cls, batch: int, max_tokens: int, shape: TileShape) -> "TileCapacity":
        """Enough for any `batch` rows whose sequences have at most `max_tokens` tokens each."""
        most_splits = -(-max_tokens // MIN_SPLIT)  # of a list; of prefix and own part one more
        low_items = min(batch * (most_splits + 1), 2 * batch + shape.num_spare_items)
        high_items = min(batch * most_splits, batch + shape.num_spare_items)
        low_parts = min(low_items * shape.rows_per_item, batch * (most_splits + 1))
        high_parts = min(high_items * shape.rows_per_item, batch * most_splits)
        return cls(low_items, high_items, low_parts + high_parts)

    @property
    def items(self) -> int:
        return self.low_items + self.high_items


@dataclass(frozen=True, slots=True, eq=False)
class TileRows:
    """What each row of a batch reads: [B] integers each. Offsets are those in SLOTS.

    Rows of a prompt's question are consecutive, and are never pruned: their `first_pruned` is T.
    """

    prefix_first: Integers
    prefix_length: Integers
    first_pruned: Integers  # L; T where stage II is off
    seat_first: Integers
    num_front: Integers  # kept and prefix text slots, that lead the seat's list
    num_own: Integers  # own slots that the row sees, its own token's included

    def __len__(self) -> int:
        return len(self.seat_first)


@dataclass(frozen=True, slots=True, eq=False)
class TileBuffers:
    """Where a step's tiles are written for the device; as large as a capacity says."""

    items: Int32s  # [cap, ITEM_COLUMNS]
    num_items: Int32s  # [1]
    parts: Int32s  # [cap]
    first: Int32s  # [2, bucket + 1]


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    items: Int32s  # [n, ITEM_COLUMNS]: first those of the low side
    parts: Int32s  # item * M + row within it * R
    first: Int32s  # [2, B + 1]: offsets in `parts` by side

    def write(self, buffers: TileBuffers) -> None:
        """Rows of the bucket beyond the batch get no parts."""
        num_items, num_rows = len(self.items), self.first.shape[1]
        buffers.items[:num_items] = self.items
        buffers.num_items[0] = num_items
        buffers.parts[: len(self.parts)] = self.parts
        buffers.first[:, :num_rows] = self.first
        buffers.first[:, num_rows:] = self.first[:, -1:]


def plan_tiles(rows: TileRows, shape: TileShape, capacity: TileCapacity) -> Tiles:
    """Cuts a step's attention into items.

    Args:
        capacity: of the bucket, or of what the caller allocates for rows that no graph runs.

    Raises:
        ValueError: more units than the capacity has items: it was made for fewer rows.
    """
    low = _split(_low_units(rows, shape), capacity.low_items, shape)
    high = _split(_high_units(rows, shape), capacity.high_items, shape)
    low_parts, low_first = _parts(low, len(rows), shape)
    high_parts, high_first = _parts(high, len(rows), shape)
    high_parts += len(low) * shape.tile_rows
    high_first += len(low_parts)
    if len(low_parts) + len(high_parts) > capacity.parts:
        raise ValueError(f"more parts than the {capacity.parts} that there is room for")
    return Tiles(
        items=np.concatenate([low, high]).astype(np.int32),
        parts=np.concatenate([low_parts, high_parts]).astype(np.int32),
        first=np.stack([low_first, high_first]).astype(np.int32),
    )


def choose_tile_rows(group_sizes: Iterable[int], num_heads_per_group: int) -> int:
    """M: the large tile where more rows share a list than a small tile holds.

    Args:
        group_sizes: numbers of neighbouring rows that read one list: see `sizes_of_groups`.
    """
    num_rows = max(group_sizes, default=1)
    return SMALL_TILE if num_rows * num_heads_per_group <= SMALL_TILE else LARGE_TILE


def sizes_of_groups(rows: TileRows) -> Integers:
    """Numbers of neighbouring rows that share their prefix and their L."""
    starts = np.flatnonzero(_begins_prefix(rows))
    return np.diff(starts, append=len(rows))


def _low_units(rows: TileRows, shape: TileShape) -> Integers:
    """Prefixes, then own parts: unsplit items [n, ITEM_COLUMNS]."""
    prefixes = _units(_begins_prefix(rows), rows.prefix_first, shape)
    prefixes[:, CAUSAL] = prefixes[:, NUM_SLOTS] = rows.prefix_length[prefixes[:, FIRST_ROW]]
    own = _seat_units(rows, rows.seat_first + rows.num_front, rows.num_own, shape)
    units = np.concatenate([prefixes, own])
    # From -1 on: with L = 0 a row attends to everything before layer 0, to score.
    units[:, FIRST_LAYER] = -1
    units[:, END_LAYER] = np.minimum(rows.first_pruned, shape.num_layers)[units[:, FIRST_ROW]]
    return units[units[:, NUM_SLOTS] > 0]


def _high_units(rows: TileRows, shape: TileShape) -> Integers:
    """Whole lists of seats that are pruned: unsplit items [n, ITEM_COLUMNS]."""
    units = _seat_units(rows, rows.seat_first, rows.num_front + rows.num_own, shape)
    units[:, FIRST_LAYER] = rows.first_pruned[units[:, FIRST_ROW]]
    units[:, END_LAYER] = shape.num_layers
    return units[(units[:, NUM_SLOTS] > 0) & (units[:, FIRST_LAYER] < shape.num_layers)]


def _seat_units(
    rows: TileRows, first_slot: Integers, num_seen: Integers, shape: TileShape
) -> Integers:
    """Of a list where each row of a tile sees one slot more than the row before."""
    units = _units(_begins_seat(rows), first_slot, shape)
    units[:, CAUSAL] = num_seen[units[:, FIRST_ROW]]
    units[:, NUM_SLOTS] = num_seen[units[:, FIRST_ROW] + units[:, NUM_ROWS] - 1]
    return units


def _units(begins: npt.NDArray[np.bool_], first_slot: Integers, shape: TileShape) -> Integers:
    """Tiles of rows: runs begin where `begins` says, and are cut. Sets rows and first slots."""
    index = np.arange(len(begins))
    run_start = np.maximum.accumulate(np.where(begins, index, 0))
    starts = np.flatnonzero((index - run_start) % shape.rows_per_item == 0)
    units = np.zeros((len(starts), ITEM_COLUMNS), np.int64)
    units[:, FIRST_ROW] = starts
    units[:, NUM_ROWS] = np.diff(starts, append=len(begins))
    units[:, FIRST_SLOT] = first_slot[starts]
    return units


def _begins_prefix(rows: TileRows) -> npt.NDArray[np.bool_]:
    return _differs(rows.prefix_first, rows.prefix_length, rows.first_pruned)


def _begins_seat(rows: TileRows) -> npt.NDArray[np.bool_]:
    """Or breaks off a seat's rows, each of which sees one slot more than the one before."""
    surplus = rows.num_own - np.arange(len(rows))
    return _differs(rows.seat_first, surplus, rows.first_pruned)


def _differs(*columns: Integers) -> npt.NDArray[np.bool_]:
    """Whether a row differs from the one before; the first one does."""
    differs = np.ones(len(columns[0]), bool)
    if len(differs):
        differs[1:] = False
    for column in columns:
        differs[1:] |= column[1:] != column[:-1]
    return differs


def _split(units: Integers, max_items: int, shape: TileShape) -> Integers:
    """Items [n, ITEM_COLUMNS], n at most `max_items`."""
    lengths = units[:, NUM_SLOTS]
    if not len(units):
        return units
    # Beyond the spare items more would not fill the device better.
    split = split_length(lengths, min(max_items, len(units) + shape.num_spare_items))
    counts = -(-lengths // split)
    even = _multiple_above(-(-lengths // counts))  # at most `split`, so no list gets more items
    counts = -(-lengths // even)
    items = np.repeat(units, counts, axis=0)
    places = np.arange(len(items)) - np.repeat(np.cumsum(counts) - counts, counts)
    even = np.repeat(even, counts)
    begins = places * even
    items[:, FIRST_SLOT] += begins
    items[:, NUM_SLOTS] = np.minimum(even, items[:, NUM_SLOTS] - begins)
    items[:, CAUSAL] = np.minimum(items[:, CAUSAL] - begins, items[:, NUM_SLOTS])
    return items


def split_length(lengths: Integers, max_items: int) -> int:
    """The shortest split, a multiple of SPLIT_STEP from MIN_SPLIT on, that gives few enough items.

    Args:
        lengths: of the lists, each at least 1.

    Raises:
        ValueError: more lists than items.
    """
    if len(lengths) > max_items:
        raise ValueError(f"{len(lengths)} lists of slots do not fit {max_items} items")

    def fits(steps: int) -> bool:
        return int((-(-lengths // (steps * SPLIT_STEP))).sum()) <= max_items

    least, most = MIN_SPLIT // SPLIT_STEP, int(_multiple_above(lengths.max())) // SPLIT_STEP
    if fits(least):
        return MIN_SPLIT
    # The number of items never grows with the split; `most` fits, with one item per list.
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if fits(middle) else (middle, most)
    return most * SPLIT_STEP


def _multiple_above(lengths: Integers) -> Integers:
    return -(-lengths // SPLIT_STEP) * SPLIT_STEP


def _parts(items: Integers, num_rows: int, shape: TileShape) -> tuple[Integers, Integers]:
    """Each row's parts, row after row, and where each row's begin: [num_rows + 1].

    A row gets no part of an item in which it sees nothing.
    """
    rows_in = items[:, NUM_ROWS]
    item = np.repeat(np.arange(len(items)), rows_in)
    within = np.arange(len(item)) - np.repeat(np.cumsum(rows_in) - rows_in, rows_in)
    sees = items[item, CAUSAL] + within > 0
    item, within = item[sees], within[sees]
    row = items[item, FIRST_ROW] + within
    order = np.argsort(row, kind="stable")
    parts = item * shape.tile_rows + within * shape.num_heads_per_group
    first = np.zeros(num_rows + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=num_rows), out=first[1:])
    return parts[order], first
