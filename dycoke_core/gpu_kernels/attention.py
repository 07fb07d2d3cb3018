"""Attention over lists of slots: computed in parts that the step's items define, merged per row.

Knows no sequence: `items` says which rows read which slots in which layers, `parts` which results
belong to a row. Keys and values are in one pool for all layers (`rows.PAGE`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dycoke_core.gpu_kernels.columns import (
    CAUSAL,
    END_LAYER,
    FIRST_LAYER,
    FIRST_PRUNED,
    FIRST_ROW,
    FIRST_SLOT,
    ITEM_COLUMNS,
    NUM_ROWS,
    NUM_SLOTS,
    PAGE,
    ROW_COLUMNS,
)
from dycoke_core.gpu_kernels.launch import check_rows, check_tensors, launch, require

TILE_ROWS = (16, 64)  # M: what a tensor-core instruction takes, and what sequences may share
_TILE_SLOTS = 64  # 128 slots at M = 64 need more registers than there are
# Few programs must each have many reads in flight; many programs must leave each other room.
_TILE_PARTS_OF_FEW, _TILE_PARTS_OF_MANY, FEW = 64, 16, 512


def split_attend(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    items: Tensor,
    num_items: Tensor,
    out: Tensor,
    log_total: Tensor,
    *,
    layer: int,
    list_layer: int,
    scaling: float,
    tile_rows: int,
) -> None:
    """Attention of each active item's rows to its slots, into one part per item.

    Row j of an item sees its slot i if i < CAUSAL + j. A row that sees no slot gets zeros and a log
    total of -inf. Parts of inactive items, and rows beyond an item's, are not written. Keys and
    values are read once per item: 2 * G * E elements per slot. A program has the next 64 slots in
    flight while it computes: with 7B's heads in bfloat16 three programs of M = 16, or one or two of
    M = 64, share a multiprocessor and have about 200 KB in flight.

    Args:
        q: [B, H, E], rows of any stride.
        k_pool, v_pool: [R, G, E] in q's dtype.
        slots: int32 [*].
        items: int32 [cap, ITEM_COLUMNS]; NUM_ROWS at most tile_rows // (H / G).
        num_items: int32 [1], how many items this step has.
        out, log_total: float32 [cap, G, M, E] and [cap, G, M], written.
        layer: the layer whose keys are read.
        list_layer: items are active if FIRST_LAYER <= list_layer < END_LAYER.
        tile_rows: M, 16 or 64.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    num_heads, head_size = q.shape[1], q.shape[2]
    cap, num_kv_heads = items.shape[0], k_pool.shape[1]
    _check_heads(num_heads, num_kv_heads, head_size, tile_rows)
    require(q.stride(2) == 1 and q.stride(1) == head_size, "a row of q must be contiguous")
    require(k_pool.shape == v_pool.shape, "pools must be of one shape")
    require(k_pool.shape[2] == head_size, "pools and q must have one head size")
    check_tensors(q.dtype, k_pool=k_pool, v_pool=v_pool)
    require(items.shape == (cap, ITEM_COLUMNS.value), "items must be [cap, 8]")
    require(out.shape == (cap, num_kv_heads, tile_rows, head_size), "out must be [cap, G, M, E]")
    require(log_total.shape == out.shape[:3], "log_total must be [cap, G, M]")
    check_tensors(torch.int32, slots=slots, items=items, num_items=num_items)
    check_tensors(torch.float32, out=out, log_total=log_total)
    has_tensor_cores = q.dtype != torch.float32
    launch(
        split_attend_kernel,
        (cap * num_kv_heads,),
        q,
        k_pool,
        v_pool,
        slots,
        items,
        num_items,
        out,
        log_total,
        scaling,
        layer,
        list_layer,
        q.stride(0),
        G=num_kv_heads,
        R=num_heads // num_kv_heads,
        E=head_size,
        M=tile_rows,
        N=_TILE_SLOTS,
        num_warps=4 if has_tensor_cores and tile_rows == 16 else 8,
        num_stages=_num_stages(head_size) if has_tensor_cores else 2,
    )


def _num_stages(head_size: int) -> int:
    """With 3, each copy is waited for as it starts; but more of the largest heads fit no A100."""
    return 5 if head_size <= 128 else 3


def merge_parts(
    out: Tensor,
    log_total: Tensor,
    parts: Tensor,
    first: Tensor,
    rows: Tensor,
    o: Tensor,
    total: Tensor,
    *,
    list_layer: int,
    tile_rows: int,
) -> None:
    """Combines each row's parts into its attention, exactly. A row without parts gets zeros, -inf.

    From its layer FIRST_PRUNED on a row's parts are those of side 1, before those of side 0. Reads
    H * E float32 per part.

    Args:
        out, log_total: as `split_attend` wrote them.
        parts: int32 [*], item * M + (row - first row of the item) * H / G.
        first: int32 [2, B + 1], where each row's parts start, by side.
        rows: int32 [B, ROW_COLUMNS].
        o: [B, H, E] in the model's dtype, written.
        total: float32 [B, H], written: log of the softmax denominators.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    num_rows, num_heads, head_size = o.shape
    num_kv_heads = out.shape[1]
    _check_heads(num_heads, num_kv_heads, head_size, tile_rows)
    require(out.shape[1:] == (num_kv_heads, tile_rows, head_size), "out must be [cap, G, M, E]")
    check_rows(rows, num_rows)
    require(first.shape == (2, num_rows + 1), "first must be [2, B + 1]")
    require(total.shape == (num_rows, num_heads), "total must be [B, H]")
    require(o.is_contiguous(), "o must be contiguous")
    check_tensors(torch.int32, parts=parts, first=first)
    check_tensors(torch.float32, out=out, log_total=log_total, total=total)
    launch(
        merge_parts_kernel,
        (num_rows, num_heads),
        out,
        log_total,
        parts,
        first,
        rows,
        o,
        total,
        list_layer,
        num_rows,
        H=num_heads,
        G=num_kv_heads,
        E=head_size,
        M=tile_rows,
        P=_TILE_PARTS_OF_FEW if num_rows * num_heads <= FEW else _TILE_PARTS_OF_MANY,
        num_warps=4,
    )


def _check_heads(num_heads: int, num_kv_heads: int, head_size: int, tile_rows: int) -> None:
    require(num_heads % num_kv_heads == 0, "H must be a multiple of G")
    require(tile_rows in TILE_ROWS, f"tile_rows must be one of {TILE_ROWS}")
    require(num_heads // num_kv_heads <= tile_rows, "a tile must hold the rows of one token")
    require(head_size in (16, 32, 64, 128, 256), "E must be a power of two from 16 to 256")


@triton.jit(do_not_specialize=["layer", "list_layer"])
def split_attend_kernel(
    q,
    k_pool,
    v_pool,
    slots,
    items,
    num_items,
    out,
    log_total,
    scaling,
    layer,
    list_layer,
    q_stride,
    G: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    # Programs that run at the same time read neighbouring heads of the same slots.
    item = tl.program_id(0) // G
    g = tl.program_id(0) % G
    # Loaded together, so that a program without work returns after one read.
    entry = items + item * ITEM_COLUMNS
    first_layer = tl.load(entry + FIRST_LAYER)
    end_layer = tl.load(entry + END_LAYER)
    first_row = tl.load(entry + FIRST_ROW).to(tl.int64)
    num_rows = tl.load(entry + NUM_ROWS)
    first_slot = tl.load(entry + FIRST_SLOT)
    num_slots = tl.load(entry + NUM_SLOTS)
    causal = tl.load(entry + CAUSAL)
    is_item = item < tl.load(num_items)
    if is_item & (first_layer <= list_layer) & (list_layer < end_layer):
        item_slots = slots + first_slot
        first_place = layer.to(tl.int64) * PAGE

        m = tl.arange(0, M)
        n = tl.arange(0, N)
        e = tl.arange(0, E)
        is_row = m < num_rows * R
        sees = causal + m // R  # [M] slots before this one
        q_row = q + (first_row + m // R) * q_stride + (g * R + m % R) * E
        query = tl.load(q_row[:, None] + e[None, :], mask=is_row[:, None], other=0.0)

        top = tl.full([M], -float("inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        output = tl.zeros([M, E], tl.float32)
        for begin in range(0, num_slots, N):
            is_slot = begin + n < num_slots
            slot = tl.load(item_slots + begin + n, mask=is_slot, other=0)
            place = ((slot + first_place) * G + g) * E
            key = tl.load(k_pool + place[:, None] + e[None, :], mask=is_slot[:, None], other=0.0)
            value = tl.load(v_pool + place[:, None] + e[None, :], mask=is_slot[:, None], other=0.0)
            logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
            is_seen = is_slot[None, :] & ((begin + n)[None, :] < sees[:, None])
            logits = tl.where(is_seen, logits, -float("inf"))
            new_top = tl.maximum(top, tl.max(logits, 1))
            # Nothing seen yet: any finite number will do; -inf - -inf would be NaN.
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
            weights = tl.exp(logits - base[:, None])
            shrink = tl.exp(top - base)
            total = total * shrink + tl.sum(weights, 1)
            output = output * shrink[:, None]
            output += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
            top = new_top

        total = tl.where(total > 0, total, 1.0)
        part = (item * G + g).to(tl.int64) * M
        tl.store(
            out + (part + m)[:, None] * E + e[None, :],
            output / total[:, None],
            mask=is_row[:, None],
        )
        tl.store(log_total + part + m, top + tl.log(total), mask=is_row)


@triton.jit(do_not_specialize=["list_layer", "num_rows"])
def merge_parts_kernel(
    out,
    log_total,
    parts,
    first,
    rows,
    o,
    total,
    list_layer,
    num_rows,
    H: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
):
    b = tl.program_id(0)
    h = tl.program_id(1)
    R: tl.constexpr = H // G
    side = list_layer >= tl.load(rows + b * ROW_COLUMNS + FIRST_PRUNED)
    row_first = first + side.to(tl.int32) * (num_rows + 1) + b
    begin = tl.load(row_first)
    end = tl.load(row_first + 1)
    e = tl.arange(0, E)
    top = -float("inf")
    row_total = 0.0
    output = tl.zeros([E], tl.float32)
    for start in range(begin, end, P):
        i = start + tl.arange(0, P)
        is_part = i < end
        part = tl.load(parts + i, mask=is_part, other=0)
        place = ((part // M) * G + h // R).to(tl.int64) * M + part % M + h % R
        part_total = tl.load(log_total + place, mask=is_part, other=-float("inf"))
        # Parts whose rows saw nothing were written; stale parts of inactive items are not read.
        part_output = tl.load(
            out + place[:, None] * E + e[None, :], mask=is_part[:, None], other=0.0
        )
        new_top = tl.maximum(top, tl.max(part_total, 0))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp(part_total - base)
        shrink = tl.exp(top - base)
        row_total = row_total * shrink + tl.sum(weights, 0)
        output = output * shrink + tl.sum(weights[:, None] * part_output, 0)
        top = new_top
    row_total = tl.where(row_total > 0, row_total, 1.0)
    at = (b * H + h).to(tl.int64)
    tl.store(o + at * E + e, (output / row_total).to(o.dtype.element_ty))
    tl.store(total + at, top + tl.log(row_total))
