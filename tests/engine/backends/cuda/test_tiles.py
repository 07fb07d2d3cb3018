"""Work items against the definition: on each side a row sees each of its slots exactly once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dycoke_core.engine.backends.cuda.tiles import (
    LARGE_TILE,
    MIN_SPLIT,
    SMALL_TILE,
    SPLIT_STEP,
    TileBuffers,
    TileCapacity,
    TileRows,
    Tiles,
    TileShape,
    choose_tile_rows,
    plan_tiles,
    sizes_of_groups,
    split_length,
)
from dycoke_core.gpu_kernels.attention import merge_parts, split_attend
from dycoke_core.gpu_kernels.rows import (
    CAUSAL,
    END_LAYER,
    FIRST_LAYER,
    FIRST_ROW,
    FIRST_SLOT,
    ITEM_COLUMNS,
    NUM_ROWS,
    NUM_SLOTS,
    PAGE,
)
from tests.gpu_kernels.slot_lists import DEVICE, SlotPool, int32, slow_attention, table_row

NUM_LAYERS = 6
MAX_TOKENS = 1200


@dataclass(frozen=True)
class Seat:
    """A sequence in a step: a decode row, or several rows of its question."""

    prefix: int
    first_pruned: int
    num_front: int
    num_own: int  # that its first row sees
    num_rows: int = 1


def table(seats: Sequence[Seat], prefix_lengths: Sequence[int]) -> TileRows:
    """Lists one after the other in SLOTS: prefixes, then seats."""
    prefix_first = np.cumsum([0, *prefix_lengths])
    columns: list[list[int]] = [[] for _ in range(6)]
    seat_first = int(prefix_first[-1])
    for seat in seats:
        for row in range(seat.num_rows):
            values = (
                int(prefix_first[seat.prefix]),
                prefix_lengths[seat.prefix],
                seat.first_pruned,
                seat_first,
                seat.num_front,
                seat.num_own + row,
            )
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        seat_first += seat.num_front + seat.num_own + seat.num_rows
    return TileRows(*(np.array(column, np.int64) for column in columns))


def visible_slots(rows: TileRows, row: int, side: int) -> list[int]:
    """By definition: what a row reads below L (side 0) and from L on (side 1), ascending."""
    seat_first, num_front = int(rows.seat_first[row]), int(rows.num_front[row])
    own_end = seat_first + num_front + int(rows.num_own[row])
    if side == 1:
        return list(range(seat_first, own_end))
    first = int(rows.prefix_first[row])
    prefix = range(first, first + int(rows.prefix_length[row]))
    return [*prefix, *range(seat_first + num_front, own_end)]


def read_slots(tiles: Tiles, shape: TileShape, row: int, side: int) -> list[int]:
    """What the kernels would read for a row, item by item, sorted."""
    slots: list[int] = []
    begin, end = tiles.first[side, row : row + 2]
    for part in tiles.parts[begin:end].tolist():
        item, within = divmod(part, shape.tile_rows)
        row_in_item, rest = divmod(within, shape.num_heads_per_group)
        entry = tiles.items[item]
        assert rest == 0 and row_in_item < entry[NUM_ROWS]
        assert entry[FIRST_ROW] + row_in_item == row
        count = min(entry[NUM_SLOTS], entry[CAUSAL] + row_in_item)
        assert count > 0, "a part in which the row sees nothing"
        slots += range(entry[FIRST_SLOT], entry[FIRST_SLOT] + count)
    return sorted(slots)


def active_layers(tiles: Tiles, shape: TileShape, row: int, side: int) -> set[tuple[int, int]]:
    begin, end = tiles.first[side, row : row + 2]
    entries = tiles.items[tiles.parts[begin:end] // shape.tile_rows]
    return {(int(e[FIRST_LAYER]), int(e[END_LAYER])) for e in entries}


def check_tiles(
    tiles: Tiles, rows: TileRows, shape: TileShape, capacity: TileCapacity | None = None
) -> None:
    for row in range(len(rows)):
        first_pruned = int(rows.first_pruned[row])
        assert read_slots(tiles, shape, row, 0) == sorted(visible_slots(rows, row, 0))
        assert active_layers(tiles, shape, row, 0) <= {(-1, first_pruned)}
        is_pruned = first_pruned < shape.num_layers
        expected = sorted(visible_slots(rows, row, 1)) if is_pruned else []
        assert read_slots(tiles, shape, row, 1) == expected
        assert active_layers(tiles, shape, row, 1) <= {(first_pruned, shape.num_layers)}
    assert tiles.first[0, 0] == 0 and tiles.first[1, -1] == len(tiles.parts)
    assert tiles.first[0, -1] == tiles.first[1, 0]
    assert len(set(tiles.parts.tolist())) == len(tiles.parts)
    assert (tiles.items[:, NUM_ROWS] <= shape.rows_per_item).all()
    assert (tiles.items[:, NUM_ROWS] > 0).all() and (tiles.items[:, NUM_SLOTS] > 0).all()
    if capacity is not None:
        is_high = tiles.items[:, FIRST_LAYER] >= 0
        assert (~is_high).sum() <= capacity.low_items and is_high.sum() <= capacity.high_items
        assert len(tiles.parts) <= capacity.parts


@st.composite
def batches(draw: st.DrawFn) -> tuple[TileRows, TileShape]:
    prefix_lengths = draw(st.lists(st.integers(0, 900), min_size=1, max_size=3))
    seats = draw(
        st.lists(
            st.builds(
                Seat,
                prefix=st.integers(0, len(prefix_lengths) - 1),
                first_pruned=st.sampled_from([0, 1, 3, NUM_LAYERS]),
                num_front=st.sampled_from([0, 1, 30, 290]),
                num_own=st.one_of(st.integers(1, 300), st.sampled_from([1, 64, 255, 256, 257])),
                num_rows=st.sampled_from([1, 1, 1, 2, 9, 10, 30]),
            ),
            max_size=12,
        )
    )
    if draw(st.booleans()):
        seats.sort(key=lambda seat: seat.prefix)
    tile_rows = draw(st.sampled_from([SMALL_TILE, LARGE_TILE]))
    num_heads_per_group = draw(st.sampled_from([1, 2, 7, 8, 16]))
    num_kv_heads = draw(st.sampled_from([1, 4, 200, 2048]))
    shape = TileShape(tile_rows, num_heads_per_group, num_kv_heads, NUM_LAYERS)
    return table(seats, prefix_lengths), shape


@given(batch=batches())
@settings(max_examples=150)
def test_every_row_sees_each_of_its_slots_once_on_each_side(
    batch: tuple[TileRows, TileShape],
) -> None:
    rows, shape = batch
    capacity = TileCapacity.for_batch(len(rows), MAX_TOKENS, shape)
    check_tiles(plan_tiles(rows, shape, capacity), rows, shape, capacity)


@given(
    batch=st.integers(1, 300),
    max_tokens=st.sampled_from([1, 64, 257, 5000, 32768, 131072]),
    num_heads_per_group=st.sampled_from([1, 7, 16]),
    num_kv_heads=st.sampled_from([1, 4, 8, 2048]),
    tile_rows=st.sampled_from([SMALL_TILE, LARGE_TILE]),
    data=st.data(),
)
@settings(max_examples=60)
def test_a_buckets_capacity_holds_any_batch_of_allowed_lengths(
    batch: int,
    max_tokens: int,
    num_heads_per_group: int,
    num_kv_heads: int,
    tile_rows: int,
    data: st.DataObject,
) -> None:
    shape = TileShape(tile_rows, num_heads_per_group, num_kv_heads, NUM_LAYERS)
    capacity = TileCapacity.for_batch(batch, max_tokens, shape)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    # Few or many distinct prefixes, of lengths at both ends of what is allowed or in between.
    num_prefixes = data.draw(st.integers(1, batch))
    lengths = rng.integers(0, max_tokens, num_prefixes)
    lengths[rng.random(num_prefixes) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))] = max_tokens - 1
    prefix = np.sort(rng.integers(0, num_prefixes, batch))
    num_own = rng.integers(1, max_tokens - lengths[prefix] + 1)
    rows = TileRows(
        prefix_first=prefix * max_tokens,
        prefix_length=lengths[prefix],
        first_pruned=rng.integers(0, NUM_LAYERS + 1, batch),
        seat_first=np.arange(batch) * max_tokens + num_prefixes * max_tokens,
        num_front=rng.integers(0, max_tokens - num_own + 1),
        num_own=num_own,
    )
    tiles = plan_tiles(rows, shape, capacity)
    is_high = tiles.items[:, FIRST_LAYER] >= 0
    assert (~is_high).sum() <= capacity.low_items and is_high.sum() <= capacity.high_items
    assert len(tiles.parts) <= capacity.parts


@given(
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=40), num_spare=st.integers(0, 300)
)
def test_the_split_is_the_shortest_that_gives_few_enough_items(
    lengths: list[int], num_spare: int
) -> None:
    max_items = len(lengths) + num_spare
    split = split_length(np.array(lengths), max_items)

    def count(length: int) -> int:
        return sum(-(-each // length) for each in lengths)

    assert count(split) <= max_items and split % SPLIT_STEP == 0
    assert split == MIN_SPLIT or count(split - SPLIT_STEP) > max_items


def test_more_lists_than_items_are_refused() -> None:
    with pytest.raises(ValueError, match="3 lists of slots do not fit 2 items"):
        split_length(np.array([5, 5, 5]), 2)
    shape = TileShape(SMALL_TILE, 7, 4, NUM_LAYERS)
    seats = [Seat(0, 3, 10, 5)] * 3
    narrow = TileCapacity(low_items=10, high_items=2, parts=50)
    with pytest.raises(ValueError, match="do not fit 2 items"):
        plan_tiles(table(seats, [100]), shape, narrow)
    roomy = TileCapacity(low_items=10, high_items=10, parts=5)
    with pytest.raises(ValueError, match="more parts than the 5"):
        plan_tiles(table(seats, [100]), shape, roomy)


def test_neighbours_that_share_a_prefix_read_it_once_per_tile() -> None:
    rows = table([Seat(0, NUM_LAYERS, 0, 5)] * 20, [600])
    for tile_rows, num_tiles in ((SMALL_TILE, 10), (LARGE_TILE, 3)):
        shape = TileShape(tile_rows, 7, 4, NUM_LAYERS)
        tiles = plan_tiles(rows, shape, TileCapacity.for_batch(20, MAX_TOKENS, shape))
        over_prefix = tiles.items[tiles.items[:, FIRST_SLOT] < 600]
        assert over_prefix[:, NUM_SLOTS].sum() == num_tiles * 600
        check_tiles(tiles, rows, shape)


def test_rows_of_other_layers_or_prefixes_share_nothing() -> None:
    seats = [Seat(0, 3, 10, 5), Seat(0, 2, 10, 5), Seat(1, 2, 10, 5), Seat(0, 2, 10, 5)]
    rows = table(seats, [100, 100])
    shape = TileShape(LARGE_TILE, 7, 4, NUM_LAYERS)
    tiles = plan_tiles(rows, shape, TileCapacity.for_batch(4, MAX_TOKENS, shape))
    assert tiles.items[:, NUM_ROWS].tolist() == [1] * 12
    assert sizes_of_groups(rows).tolist() == [1, 1, 1, 1]
    check_tiles(tiles, rows, shape)


def test_a_question_is_causal_in_its_own_part_and_shares_the_prefix_with_other_questions() -> None:
    questions = [Seat(0, NUM_LAYERS, 40, 1, num_rows=20), Seat(0, NUM_LAYERS, 40, 7, num_rows=5)]
    rows = table(questions, [500])
    shape = TileShape(LARGE_TILE, 7, 4, NUM_LAYERS)
    assert shape.rows_per_item == 9
    tiles = plan_tiles(rows, shape, TileCapacity.for_batch(25, MAX_TOKENS, shape))
    over_prefix = tiles.items[tiles.items[:, FIRST_SLOT] < 500]
    assert sorted(set(over_prefix[:, FIRST_ROW].tolist())) == [0, 9, 18]
    own = tiles.items[tiles.items[:, FIRST_SLOT] >= 500]
    assert own[:, [FIRST_ROW, NUM_ROWS, NUM_SLOTS, CAUSAL]].tolist() == [
        [0, 9, 9, 1],
        [9, 9, 18, 10],
        [18, 2, 20, 19],
        [20, 5, 11, 7],
    ]
    check_tiles(tiles, rows, shape)


def test_with_l_0_a_row_reads_everything_before_layer_0_and_its_own_list_in_it() -> None:
    rows = table([Seat(0, 0, 30, 4)], [100])
    shape = TileShape(SMALL_TILE, 7, 4, NUM_LAYERS)
    tiles = plan_tiles(rows, shape, TileCapacity.for_batch(1, MAX_TOKENS, shape))
    assert tiles.items[:, [FIRST_LAYER, END_LAYER]].tolist() == [[-1, 0], [-1, 0], [0, NUM_LAYERS]]
    check_tiles(tiles, rows, shape)


def test_a_list_is_split_evenly() -> None:
    rows = table([Seat(0, NUM_LAYERS, 0, 1)], [520])
    shape = TileShape(SMALL_TILE, 7, 4, NUM_LAYERS)
    tiles = plan_tiles(rows, shape, TileCapacity.for_batch(1, MAX_TOKENS, shape))
    assert tiles.items[:3, NUM_SLOTS].tolist() == [192, 192, 136], "not 256, 256, 8"


def test_a_large_batch_gets_fewer_items_per_row_than_a_small_one() -> None:
    shape = TileShape(SMALL_TILE, 7, 4, 28)
    lengths = {}
    for batch in (1, 64, 256):
        rows = table([Seat(i, 28, 0, 100) for i in range(batch)], [6272] * batch)
        tiles = plan_tiles(rows, shape, TileCapacity.for_batch(batch, 32768, shape))
        lengths[batch] = int(tiles.items[:, NUM_SLOTS].max())
        assert len(tiles.items) <= 2 * batch + shape.num_spare_items
    assert lengths[1] == 256 < lengths[64] < lengths[256]


@pytest.mark.parametrize("tile_rows", [SMALL_TILE, LARGE_TILE])
@pytest.mark.parametrize("list_layer", [-1, 0, 2, 3])
def test_the_kernels_attend_to_exactly_these_slots(list_layer: int, tile_rows: int) -> None:
    seats = [
        *(Seat(0, 3, 70, own) for own in (3, 150, 20)),
        Seat(1, 0, 70, 40),
        Seat(1, NUM_LAYERS, 70, 60, num_rows=11),
    ]
    rows = table(seats, [290, 70])
    shape = TileShape(tile_rows, num_heads_per_group=3, num_kv_heads=2, num_layers=NUM_LAYERS)
    capacity = TileCapacity.for_batch(len(rows), MAX_TOKENS, shape)
    tiles = plan_tiles(rows, shape, capacity)
    pool = SlotPool(num_kv_heads=2, head_size=16, num_rows=120 * 4 * PAGE)
    pool.put(pool.take(int(rows.seat_first[-1]) + 141))  # one slot for each place in SLOTS
    q = pool.random((len(rows), 6, 16))
    layer = max(list_layer, 0)
    parts_shape = (len(tiles.items), 2, tile_rows)
    out = torch.full((*parts_shape, 16), torch.nan, device=DEVICE)
    log_total = torch.full(parts_shape, torch.nan, device=DEVICE)
    items, parts, first = (
        torch.from_numpy(each).to(DEVICE) for each in (tiles.items, tiles.parts, tiles.first)
    )
    split_attend(
        *(q, pool.keys, pool.values, pool.slots(), items, int32([len(items)]), out, log_total),
        layer=layer,
        list_layer=list_layer,
        scaling=0.3,
        tile_rows=tile_rows,
    )
    o, total = torch.empty_like(q), torch.empty(q.shape[:2], device=DEVICE)
    table_rows = int32([table_row(first_pruned=int(pruned)) for pruned in rows.first_pruned])
    merge_parts(
        *(out, log_total, parts, first, table_rows, o, total),
        list_layer=list_layer,
        tile_rows=tile_rows,
    )
    for row, first_pruned in enumerate(rows.first_pruned.tolist()):
        seen = visible_slots(rows, row, side=int(list_layer >= first_pruned))
        slots = [pool.lists[place] for place in seen]
        output, log_totals = slow_attention(q[row], *pool.read(slots, layer), 0.3)
        torch.testing.assert_close(o[row].double(), output, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(total[row].double(), log_totals, atol=1e-5, rtol=1e-5)


def test_an_empty_batch_has_no_items() -> None:
    shape = TileShape(SMALL_TILE, 7, 4, NUM_LAYERS)
    tiles = plan_tiles(table([], [5]), shape, TileCapacity.for_batch(1, MAX_TOKENS, shape))
    assert tiles.items.shape == (0, ITEM_COLUMNS) and tiles.first.tolist() == [[0], [0]]
    assert choose_tile_rows(sizes_of_groups(table([], [5])), 7) == SMALL_TILE


def test_tiles_are_written_with_no_parts_for_the_buckets_other_rows() -> None:
    rows = table([Seat(0, 3, 10, 5), Seat(0, 3, 10, 6)], [300])
    shape = TileShape(SMALL_TILE, 7, 4, NUM_LAYERS)
    capacity = TileCapacity.for_batch(4, MAX_TOKENS, shape)
    tiles = plan_tiles(rows, shape, capacity)
    buffers = TileBuffers(
        items=np.full((capacity.items, ITEM_COLUMNS), -7, np.int32),
        num_items=np.full(1, -7, np.int32),
        parts=np.full(capacity.parts, -7, np.int32),
        first=np.full((2, 5), -7, np.int32),
    )
    tiles.write(buffers)
    count = int(buffers.num_items[0])
    assert count == len(tiles.items) and (buffers.items[count:] == -7).all()
    assert (buffers.first[:, 2:] == tiles.first[:, -1:]).all()
    written = Tiles(buffers.items[:count], buffers.parts[: len(tiles.parts)], buffers.first[:, :3])
    check_tiles(written, rows, shape)


@pytest.mark.parametrize(
    ("sizes", "num_heads_per_group", "expected"),
    [
        ([1, 1, 1], 7, SMALL_TILE),
        ([2, 2], 7, SMALL_TILE),
        ([1, 3], 7, LARGE_TILE),
        ([2], 8, SMALL_TILE),
        ([1], 32, LARGE_TILE),
        ([], 7, SMALL_TILE),
    ],
)
def test_a_large_tile_is_taken_where_more_rows_share_than_fit_a_small_one(
    sizes: list[int], num_heads_per_group: int, expected: int
) -> None:
    assert choose_tile_rows(sizes, num_heads_per_group) == expected


def test_a_group_of_heads_that_exceeds_a_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="32 heads per group"):
        TileShape(SMALL_TILE, 32, 1, NUM_LAYERS)
