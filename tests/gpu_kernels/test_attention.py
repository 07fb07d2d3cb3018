"""Attention over lists of slots: every row's is that of a slow loop over what it may see."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dycoke_core.engine import partial_attention as fused
from dycoke_core.gpu_kernels import attention
from dycoke_core.gpu_kernels.attention import merge_parts, split_attend
from tests.gpu_kernels.slot_lists import (
    DEVICE,
    DTYPES,
    Plan,
    SlotPool,
    int32,
    slow_attention,
    table_row,
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def run(
    pool: SlotPool,
    plan: Plan,
    q: Tensor,
    first_pruned: list[int],
    *,
    layer: int,
    list_layer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, H, E], total [B, H], and the log totals of the parts, NaN where nothing was written."""
    items, parts, first = plan.tables(q.shape[0])
    shape = (len(items), pool.num_kv_heads, plan.tile_rows, pool.head_size)
    out = torch.full(shape, torch.nan, device=DEVICE)
    log_total = torch.full(shape[:3], torch.nan, device=DEVICE)
    step = {"list_layer": list_layer, "tile_rows": plan.tile_rows}
    num_items = int32([len(plan.items)])
    split_attend(
        *(q, pool.keys, pool.values, pool.slots(), items, num_items, out, log_total),
        layer=layer,
        scaling=0.3,
        **step,
    )
    rows = int32([table_row(first_pruned=pruned) for pruned in first_pruned])
    o = torch.full(q.shape, torch.nan, dtype=q.dtype, device=DEVICE)
    total = torch.full(q.shape[:2], torch.nan, device=DEVICE)
    merge_parts(out, log_total, parts, first, rows, o, total, **step)
    return o, total, log_total


def assert_attends(
    pool: SlotPool, seen: list[list[int]], q: Tensor, o: Tensor, total: Tensor, layer: int
) -> None:
    """Row b attends to the slots seen[b], in any order."""
    for row, slots in enumerate(seen):
        output, log_total = slow_attention(q[row], *pool.read(slots, layer), 0.3)
        tolerance = TOLERANCE[q.dtype]
        torch.testing.assert_close(o[row].double(), output, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(total[row].double(), log_total, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize("lengths", [[1, 63, 64], [65, 127], [128, 129], [2, 300]])
def test_lists_of_any_length(lengths: list[int], tile_rows: int, dtype: torch.dtype) -> None:
    pool = SlotPool(2, 16, dtype)
    plan = Plan(tile_rows, group=3)
    seen = [pool.take(length) for length in lengths]
    for row, slots in enumerate(seen):
        offset = pool.put(slots)
        plan.add((0,), range(row, row + 1), range(offset, offset + len(slots)), (-1, 9))
    q = pool.random((len(lengths), 6, 16))
    o, total, _ = run(pool, plan, q, [9] * len(lengths), layer=2, list_layer=2)
    assert_attends(pool, seen, q, o, total, layer=2)


@dataclass
class Seat:
    """A decoding sequence: its video, first pruned layer, and own tokens."""

    video: int
    first_pruned: int
    num_own: int
    kept: tuple[int, ...] = ()  # places in the prefix


SEATS = [
    Seat(0, 2, 5, (3, 4, 60, 99)),
    Seat(0, 2, 70, (0,)),
    Seat(0, 4, 1),  # stage II is off
    Seat(1, 0, 9, (7, 8)),  # from layer 0 on
    Seat(1, 1, 130, tuple(range(0, 80, 2))),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile_rows", [16, 64] if DEVICE == "cuda" else [16])
def test_rows_of_a_step_read_their_prefix_before_their_first_pruned_layer_and_their_list_after(
    tile_rows: int, dtype: torch.dtype
) -> None:
    pool, plan, last = SlotPool(2, 16, dtype), Plan(tile_rows, group=2), 4
    prefixes = [pool.take(100), pool.take(80)]
    at_prefix = [pool.put(slots) for slots in prefixes]
    own = [pool.take(seat.num_own) for seat in SEATS]
    everything = [prefixes[seat.video] + own[b] for b, seat in enumerate(SEATS)]
    pruned = [[prefixes[seat.video][k] for k in seat.kept] + own[b] for b, seat in enumerate(SEATS)]
    for rows, end in ((range(2), 2), (range(2, 3), 4), (range(3, 4), 0), (range(4, 5), 1)):
        video = SEATS[rows.start].video  # the first two rows share one read of their prefix
        for start in range(0, len(prefixes[video]), 48):
            stop = min(start + 48, len(prefixes[video]))
            where = range(at_prefix[video] + start, at_prefix[video] + stop)
            plan.add((0,), rows, where, (-1, end))
    for row, seat in enumerate(SEATS):
        offset, kept = pool.put(pruned[row]), len(seat.kept)
        whole = range(offset, offset + kept + seat.num_own)
        plan.add((0,), range(row, row + 1), whole[kept:], (-1, seat.first_pruned))
        plan.add((1,), range(row, row + 1), whole, (seat.first_pruned, last))
    padding = len(SEATS)
    first_pruned = [seat.first_pruned for seat in SEATS] + [last]
    q = pool.random((padding + 1, 4, 16))
    for list_layer in (-1, 0, 1, 2, 3):
        layer = max(list_layer, 0)
        o, total, parts = run(pool, plan, q, first_pruned, layer=layer, list_layer=list_layer)
        seen = [
            pruned[row] if list_layer >= seat.first_pruned else everything[row]
            for row, seat in enumerate(SEATS)
        ]
        assert_attends(pool, seen, q, o, total, layer)
        assert (o[padding] == 0).all() and (total[padding] == -torch.inf).all()
        for index, item in enumerate(plan.items):  # an item that is not active writes nothing
            is_active = item[4] <= list_layer < item[5]
            assert parts[index, :, : 2 * item[1]].isnan().all() != is_active
        assert parts[len(plan.items) :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_earlier", [0, 60, 64])
def test_rows_of_a_question_see_each_other_causally(num_earlier: int, dtype: torch.dtype) -> None:
    pool, plan = SlotPool(1, 16, dtype), Plan(64, group=7)
    prefix, own = pool.take(33), pool.take(num_earlier + 9)
    at_prefix, at_own = pool.put(prefix), pool.put(own)
    rows = range(9)
    plan.add((0,), rows, range(at_prefix, at_prefix + len(prefix)), (-1, 9))
    whole = range(at_own, at_own + len(own))
    plan.add((0,), rows, whole, (-1, 9), causal=num_earlier + 1)
    q = pool.random((9, 7, 16))
    o, total, _ = run(pool, plan, q, [9] * 9, layer=1, list_layer=1)
    seen = [prefix + own[: num_earlier + 1 + j] for j in rows]
    assert_attends(pool, seen, q, o, total, layer=1)


def test_rows_that_see_nothing_in_their_first_slots_or_in_any() -> None:
    pool, plan = SlotPool(1, 16), Plan(16, group=2)
    own = pool.take(70)
    offset = pool.put(own)
    plan.add((0,), range(0, 8), range(offset, offset + 70), (0, 1), causal=-3)
    plan.add((0,), range(8, 9), range(offset, offset), (0, 1))  # a list without slots
    q = pool.random((9, 2, 16))
    o, total, _ = run(pool, plan, q, [9] * 9, layer=0, list_layer=0)
    seen = [own[: max(j - 3, 0)] for j in range(8)] + [[]]
    assert_attends(pool, seen, q, o, total, layer=0)
    assert (o[[0, 1, 2, 3, 8]] == 0).all() and total[4].isfinite().all()


def test_slots_of_pages_for_later_layers_are_negative() -> None:
    pool, plan = SlotPool(2, 16), Plan(16, group=1)
    pool._free.append(0)  # the pool's first rows, for layers 10 to 13
    slots = pool.take(40, layers=(10, 14))
    assert max(slots) < 0
    offset = pool.put(slots)
    plan.add((0,), range(1), range(offset, offset + 40), (10, 14))
    q = pool.random((1, 2, 16))
    o, total, _ = run(pool, plan, q, [99], layer=12, list_layer=12)
    assert_attends(pool, [slots], q, o, total, layer=12)


def test_no_items_leave_zeros() -> None:
    pool, plan = SlotPool(2, 16), Plan(16, group=1)
    q = pool.random((2, 2, 16))
    o, total, parts = run(pool, plan, q, [0, 9], layer=0, list_layer=0)
    assert (o == 0).all() and (total == -torch.inf).all() and parts.isnan().all()


def test_queries_may_lie_among_keys_and_values() -> None:
    pool, plan = SlotPool(2, 16), Plan(16, group=2)
    slots = pool.take(20)
    plan.add((0,), range(3), range(pool.put(slots), 20), (0, 1))
    qkv = pool.random((3, (4 + 2 * 2) * 16))
    q = qkv[:, : 4 * 16].view(3, 4, 16)
    o, total, _ = run(pool, plan, q, [9] * 3, layer=0, list_layer=0)
    assert_attends(pool, [slots] * 3, q, o, total, layer=0)


@pytest.mark.parametrize("tile_parts", [16, 64])
@pytest.mark.parametrize("num_parts", [15, 16, 17, 64, 70])
def test_any_number_of_parts_merges_into_what_the_engine_attends_to(
    num_parts: int, tile_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "FEW", 4 if tile_parts == 64 else 3)
    pool, plan = SlotPool(1, 32), Plan(16, group=4)
    slots = pool.take(2 * num_parts)
    offset = pool.put(slots)
    for start in range(offset, offset + 2 * num_parts, 2):
        plan.add((0,), range(1), range(start, start + 2), (0, 1))
    q = pool.random((1, 4, 32))
    o, total, _ = run(pool, plan, q, [9], layer=0, list_layer=0)
    keys, values = pool.read(slots, 0)
    half = len(slots) // 2
    packed = fused.pack_queries(q, 1)
    parts = (
        fused.attend(packed, keys[s], values[s], scaling=0.3)
        for s in (slice(half), slice(half, None))
    )
    both = fused.merge(*parts)
    torch.testing.assert_close(o, fused.unpack_rows(both.output, 1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(total, both.log_total.reshape(1, 4), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 3, 16)}, "multiple of G"),
        ({"q": torch.zeros(1, 4, 16, dtype=torch.float16)}, "k_pool must be torch.float16"),
        ({"q": torch.zeros(1, 16, 4).transpose(1, 2)}, "row of q"),
        ({"slots": torch.zeros(1, dtype=torch.int64)}, "slots must be torch.int32"),
        ({"num_items": torch.zeros(2, 2, dtype=torch.int32).T}, "num_items must be contiguous"),
        ({"items": torch.zeros(2, 7, dtype=torch.int32)}, "items"),
        ({"out": torch.zeros(2, 2, 64, 16)}, "out"),
        ({"v_pool": torch.zeros(63, 2, 16)}, "one shape"),
        ({"tile_rows": 32}, "tile_rows"),
        ({"q": torch.zeros(1, 4, 20), "k_pool": torch.zeros(64, 2, 20)}, "power of two"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "q": torch.zeros(1, 4, 16),
        "k_pool": torch.zeros(64, 2, 16),
        "v_pool": torch.zeros(64, 2, 16),
        "slots": int32([0]),
        "items": torch.zeros(2, 8, dtype=torch.int32),
        "num_items": int32([0]),
        "out": torch.zeros(2, 2, 16, 16),
        "log_total": torch.zeros(2, 2, 16),
        "layer": 0,
        "list_layer": 0,
        "scaling": 1.0,
        "tile_rows": 16,
    }
    with pytest.raises(ValueError, match=message):
        split_attend(**(arguments | change))
