"""The pool of keys and values: no row is ever handed out twice, and all come back."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dycoke_core.engine.backends.cuda.pool import Extent, KVPool, RowShape, num_pages
from dycoke_core.gpu_kernels.rows import PAGE

CPU = torch.device("cpu")
NUM_LAYERS = 6
SHAPE = RowShape(NUM_LAYERS, num_kv_heads=2, head_size=4, dtype=torch.float32)

layer_ranges = st.tuples(st.integers(0, NUM_LAYERS - 1), st.integers(1, NUM_LAYERS)).filter(
    lambda layers: layers[0] < layers[1]
)
# Either an allocation, or which of the live extents is freed.
operations = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 5 * PAGE), layer_ranges),
        st.integers(0, 100),
    ),
    max_size=60,
)


def small_pool(num_pages: int = 20, num_more_rows: int = 0) -> KVPool:
    """Room for this many pages of all layers besides the one set aside."""
    num_rows = (num_pages + 1) * NUM_LAYERS * PAGE + num_more_rows
    return KVPool(SHAPE, num_rows, CPU)


def rows_by_slots(extent: Extent) -> list[int]:
    """Every row that the extent's slots name, by the contract: slot + layer * PAGE."""
    slots = extent.slots().tolist()
    layers = range(extent.first_layer, extent.end_layer)
    return [slot + layer * PAGE for layer in layers for slot in slots]


@given(operations=operations, num_more_rows=st.integers(0, 2 * PAGE))
def test_rows_never_overlap_and_all_come_back(
    operations: list[int | tuple[int, tuple[int, int]]], num_more_rows: int
) -> None:
    pool = small_pool(num_more_rows=num_more_rows)
    free_rows = pool.free_rows
    live: list[Extent] = []
    for operation in operations:
        if isinstance(operation, int):
            if live:
                pool.free(live.pop(operation % len(live)))
        else:
            num_tokens, layers = operation
            extent = pool.allocate(num_tokens, *layers)
            if extent is not None:
                assert (extent.num_tokens, extent.first_layer, extent.end_layer) == (
                    num_tokens,
                    *layers,
                )
                live.append(extent)
        pool.check()
        rows = [row for extent in live for row in rows_by_slots(extent)]
        assert len(set(rows)) == len(rows), "two tokens in one row"
        trash = set(range(NUM_LAYERS * PAGE))
        assert all(0 <= row < pool.num_rows for row in rows) and not trash & set(rows)
        assert free_rows - pool.free_rows == sum(extent.num_rows for extent in live)
    assert pool.num_live_extents == len(live)
    for extent in live:
        pool.free(extent)
    pool.check()
    assert pool.free_rows == free_rows and len(pool._free.starts) == 1


@given(
    layers=layer_ranges,
    sizes=st.lists(
        st.tuples(st.integers(1, 4 * PAGE), st.integers(0, 100)), min_size=1, max_size=80
    ),
)
def test_allocations_of_one_height_never_fail_while_bytes_suffice(
    layers: tuple[int, int], sizes: list[tuple[int, int]]
) -> None:
    pool = small_pool()
    num_layers = layers[1] - layers[0]
    height = num_layers * PAGE
    num_lost = pool.free_rows % height * SHAPE.num_bytes  # less than one page: of no use
    live: list[Extent] = []
    for num_tokens, victim in sizes:
        num_bytes = pool.bytes_of(num_tokens, num_layers)
        while num_bytes > pool.free_bytes - num_lost:
            pool.free(live.pop(victim % len(live)))
        extent = pool.allocate(num_tokens, *layers)
        assert extent is not None
        live.append(extent)


def test_a_slot_names_a_row_in_every_layer_of_its_page() -> None:
    pool = small_pool()
    first = pool.allocate(70, 0, NUM_LAYERS)
    assert first is not None and first.slots().dtype == np.int32
    page = NUM_LAYERS * PAGE
    assert first.slots().tolist() == [*range(page, page + 64), *range(2 * page, 2 * page + 6)]


def test_slots_of_pages_without_the_first_layers_may_be_negative() -> None:
    pool = KVPool(replace(SHAPE, num_layers=2), 300, CPU)
    extent = pool.allocate(3, 1, 2)
    assert extent is not None and extent.slots().tolist() == [64, 65, 66]
    assert rows_by_slots(extent) == [128, 129, 130]
    pool.free(extent)
    pool.free(pool._trash)
    extent = pool.allocate(3, 1, 2)
    assert extent is not None and extent.slots().tolist() == [-64, -63, -62]
    assert rows_by_slots(extent) == [0, 1, 2]


def test_pages_fill_the_lowest_gaps() -> None:
    pool = small_pool()
    extents = [pool.allocate(PAGE, 0, NUM_LAYERS) for _ in range(4)]
    for place in (0, 2):
        pool.free(extents[place])  # type: ignore[arg-type]
    across = pool.allocate(2 * PAGE, 0, NUM_LAYERS)
    page = NUM_LAYERS * PAGE
    assert across is not None and across.page_rows.tolist() == [page, 3 * page]


def test_what_does_not_fit_is_refused_and_takes_nothing() -> None:
    pool = small_pool(num_pages=3)
    free_rows = pool.free_rows
    assert pool.allocate(3 * PAGE + 1, 0, NUM_LAYERS) is None
    assert pool.free_rows == free_rows
    whole = pool.allocate(3 * PAGE, 0, NUM_LAYERS)
    assert whole is not None and pool.free_rows == 0
    assert pool.allocate(1, 0, 1) is None
    empty = pool.allocate(0, 0, 1)
    assert empty is not None and len(empty.slots()) == 0
    pool.check()


def test_the_page_set_aside_is_handed_to_nobody() -> None:
    pool = small_pool(num_pages=1)
    assert pool.trash_slot == 0 and pool.num_live_extents == 0
    extent = pool.allocate(PAGE, 0, NUM_LAYERS)
    assert extent is not None and min(rows_by_slots(extent)) == NUM_LAYERS * PAGE


def test_an_extent_is_freed_once() -> None:
    pool = small_pool()
    extent = pool.allocate(10, 0, 2)
    assert extent is not None
    pool.free(extent)
    with pytest.raises(AssertionError, match="freed once"):
        pool.free(extent)
    pool.check()


@pytest.mark.parametrize("arguments", [(1, 0, 0), (1, 3, 2), (1, -1, 2), (1, 0, 7), (-1, 0, 1)])
def test_impossible_layers_and_sizes_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="tokens in layers"):
        small_pool().allocate(*arguments)


def lose(pool: KVPool, extent: Extent) -> None:
    del pool._live[extent]


def hand_out_twice(pool: KVPool, extent: Extent) -> None:
    pool._live[Extent(1, 0, 1, extent.page_rows)] = None


@pytest.mark.parametrize("damage", [lose, hand_out_twice])
def test_the_check_finds_lost_and_doubly_used_rows(
    damage: Callable[[KVPool, Extent], None],
) -> None:
    pool = small_pool()
    extent = pool.allocate(10, 0, 2)
    assert extent is not None
    damage(pool, extent)
    with pytest.raises(AssertionError, match="lost"):
        pool.check()


def test_a_reservation_counts_whole_pages() -> None:
    pool = small_pool()
    row = 2 * 2 * 4 * 4
    assert pool.bytes_of(1, 3) == 3 * PAGE * row
    assert pool.bytes_of(65, 2) == 2 * 2 * PAGE * row
    assert pool.bytes_of(0, 5) == 0
    before = pool.free_bytes
    assert pool.usable_bytes == before == 20 * NUM_LAYERS * PAGE * row
    assert pool.allocate(65, 1, 3) is not None
    assert before - pool.free_bytes == pool.bytes_of(65, 2)


def test_a_pool_stays_within_its_bytes() -> None:
    pool = KVPool.within(100_000, SHAPE, CPU)
    used = pool.keys.nbytes + pool.values.nbytes
    assert 100_000 - 64 < used <= 100_000
    assert pool.keys.shape == pool.values.shape == (pool.num_rows, 2, 4)
    with pytest.raises(ValueError, match="a page of all layers"):
        KVPool.within(1000, SHAPE, CPU)


@pytest.mark.parametrize("max_bytes", [100_000, 2**17, 2**17 - 1, 2**17 + 2])
def test_a_pinned_pool_takes_the_power_of_two_below(max_bytes: int) -> None:
    pool = KVPool.pinned(max_bytes, replace(SHAPE, num_layers=2))
    assert pool.keys.device == CPU
    largest = max(size for size in (2**15, 2**16) if 2 * size <= max_bytes)
    assert pool.keys.nbytes == pool.values.nbytes == largest


def test_a_pinned_tensor_never_rounds_up_beyond_the_power_of_two() -> None:
    pool = KVPool.pinned(2**17, RowShape(2, num_kv_heads=3, head_size=5, dtype=torch.float16))
    assert 2**16 - 30 < pool.keys.nbytes <= 2**16


def test_tokens_fill_whole_pages() -> None:
    assert [num_pages(tokens) for tokens in (0, 1, 64, 65)] == [0, 1, 1, 2]
