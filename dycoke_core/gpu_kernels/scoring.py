"""Attention weights of the visual tokens in the layer that scores them.

Knows no selection: rows whose SCORING_LAYER is the layer get scores, the others are skipped.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dycoke_core.gpu_kernels.columns import (
    NUM_VISUAL,
    PAGE,
    ROW_COLUMNS,
    SCORING_LAYER,
    VISUAL_FIRST,
)
from dycoke_core.gpu_kernels.launch import check_rows, check_tensors, launch, require

_TILE_SLOTS = 64
_PROGRAMS = 1024  # fills a device of up to about 150 multiprocessors


def visual_scores(
    q: Tensor,
    k_pool: Tensor,
    slots: Tensor,
    rows: Tensor,
    total: Tensor,
    scores: Tensor,
    *,
    layer: int,
    scaling: float,
) -> None:
    """Each scoring row's attention to its visual tokens, averaged over its query heads.

    The softmax is over all keys of the layer: `total` is its denominator. Reads G * E elements per
    visual token again. The grid is fixed, and costs little if few rows score.

    Args:
        q: [B, H, E], rows of any stride.
        k_pool: [R, G, E] in q's dtype.
        slots: int32 [*].
        rows: int32 [B, ROW_COLUMNS].
        total: float32 [B, H], from `merge_parts` in the same layer.
        scores: float32 [B, stride], written at [b, :V]; V must not be more than the stride.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Source: paper Eq. 4, `compression.kv_pruning.visual_scores`.
    """
    num_rows, num_heads, head_size = q.shape
    num_kv_heads = k_pool.shape[1]
    require(num_heads % num_kv_heads == 0, "H must be a multiple of G")
    require(q.stride(2) == 1 and q.stride(1) == head_size, "a row of q must be contiguous")
    require(k_pool.shape[2] == head_size, "k_pool must be [R, G, E]")
    check_tensors(q.dtype, k_pool=k_pool)
    check_tensors(torch.int32, slots=slots)
    check_rows(rows, num_rows)
    require(total.shape == (num_rows, num_heads), "total must be [B, H]")
    require(scores.dim() == 2 and scores.shape[0] == num_rows, "scores must be [B, stride]")
    check_tensors(torch.float32, total=total, scores=scores)
    group = num_heads // num_kv_heads
    tiles = triton.cdiv(scores.shape[1], _TILE_SLOTS)
    launch(
        visual_scores_kernel,
        (num_rows, min(tiles, max(1, _PROGRAMS // max(num_rows, 1)))),
        q,
        k_pool,
        slots,
        rows,
        total,
        scores,
        scaling,
        layer,
        q.stride(0),
        scores.stride(0),
        G=num_kv_heads,
        R=group,
        E=head_size,
        M=max(16, triton.next_power_of_2(group)),
        N=_TILE_SLOTS,
        num_warps=4,
        num_stages=3,
    )


@triton.jit(do_not_specialize=["layer"])
def visual_scores_kernel(
    q,
    k_pool,
    slots,
    rows,
    total,
    scores,
    scaling,
    layer,
    q_stride,
    scores_stride,
    G: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    row = rows + b * ROW_COLUMNS
    if tl.load(row + SCORING_LAYER) == layer:
        num_visual = tl.load(row + NUM_VISUAL)
        visual_slots = slots + tl.load(row + VISUAL_FIRST)
        first_place = layer.to(tl.int64) * PAGE
        m = tl.arange(0, M)
        n = tl.arange(0, N)
        e = tl.arange(0, E)
        is_head = m < R
        for begin in range(tl.program_id(1) * N, num_visual, tl.num_programs(1) * N):
            is_slot = begin + n < num_visual
            slot = tl.load(visual_slots + begin + n, mask=is_slot, other=0)
            place = (slot + first_place) * (G * E)
            summed = tl.zeros([N], tl.float32)
            for g in tl.static_range(G):
                h = g * R + m
                query = tl.load(
                    q + b * q_stride + h[:, None] * E + e[None, :],
                    mask=is_head[:, None],
                    other=0.0,
                )
                key = tl.load(
                    k_pool + place[:, None] + g * E + e[None, :], mask=is_slot[:, None], other=0.0
                )
                row_total = tl.load(total + b * (G * R) + h, mask=is_head, other=0.0)
                logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
                logits = tl.where(is_head[:, None], logits - row_total[:, None], -float("inf"))
                logits = tl.where(is_slot[None, :], logits, -float("inf"))
                summed += tl.sum(tl.exp(logits), 0)
            tl.store(scores + b * scores_stride + begin + n, summed / (G * R), mask=is_slot)
