"""Copies kept keys and values from host memory, if the DP cache is there."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dycoke_core.gpu_kernels.columns import (
    FIRST_PRUNED,
    FLAGS,
    HOST_FIRST,
    KEPT_FIRST,
    KEPT_IN_OWN_ROWS,
    NUM_KEPT,
    PAGE,
    ROW_COLUMNS,
    SEAT,
)
from dycoke_core.gpu_kernels.launch import check_rows, check_tensors, launch, require

_TILE_BYTES = 8192  # per pool
_PROGRAMS = 128  # 2 MB in flight: more than the bus carries in a round trip


def gather_kept(
    host_k: Tensor,
    host_v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    rows: Tensor,
    kept: Tensor,
    changed: Tensor,
    host_slots: Tensor,
    slots: Tensor,
    *,
    layer: int,
) -> None:
    """Copies newly kept keys and values of one layer from the host's pool into the seat's own rows.

    Acts on rows with KEPT_IN_OWN_ROWS whose kept set has changed, from layer FIRST_PRUNED on. Reads
    2 * G * E elements per kept token over the bus.

    Args:
        host_k, host_v: [R', G, E] in pinned memory, addressed like the pool.
        k_pool, v_pool: [R, G, E], of the same dtype.
        rows: int32 [B, ROW_COLUMNS]; `HOST_FIRST` is the offset in `host_slots` of the V tokens.
        kept, changed: as `gate_select` wrote them in this step.
        host_slots: int32 [*], slots of the host's pool.
        slots: int32 [*].

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    width = k_pool.shape[1] * k_pool.shape[2]  # G * E
    pools = (host_k, host_v, k_pool, v_pool)
    require(all(p.shape[1:] == k_pool.shape[1:] for p in pools), "pools must have one G and E")
    check_tensors(k_pool.dtype, host_k=host_k, host_v=host_v, k_pool=k_pool, v_pool=v_pool)
    num_rows = rows.shape[0]
    check_rows(rows, num_rows)
    require(changed.shape == (num_rows,), "changed must be [B]")
    check_tensors(torch.int32, kept=kept, changed=changed, host_slots=host_slots, slots=slots)
    padded = triton.next_power_of_2(width)
    tile = max(1, _TILE_BYTES // (padded * k_pool.element_size()))
    launch(
        gather_kept_kernel,
        (num_rows, max(1, _PROGRAMS // max(num_rows, 1))),
        *pools,
        rows,
        kept,
        changed,
        host_slots,
        slots,
        layer,
        kept.shape[1],
        W=width,
        PADDED=padded,
        N=tile,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["layer"])
def gather_kept_kernel(
    host_k,
    host_v,
    k_pool,
    v_pool,
    rows,
    kept,
    changed,
    host_slots,
    slots,
    layer,
    kept_stride,
    W: tl.constexpr,
    PADDED: tl.constexpr,
    N: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    row = rows + b * ROW_COLUMNS
    owns_rows = (tl.load(row + FLAGS) & KEPT_IN_OWN_ROWS) != 0
    # A row that has not scored yet in this step still has the `changed` of the step before.
    is_due = owns_rows & (layer >= tl.load(row + FIRST_PRUNED)) & (tl.load(changed + b) != 0)
    if is_due:
        num_kept = tl.load(row + NUM_KEPT)
        row_kept = kept + tl.load(row + SEAT).to(tl.int64) * kept_stride
        sources = host_slots + tl.load(row + HOST_FIRST)
        targets = slots + tl.load(row + KEPT_FIRST)
        first_place = layer.to(tl.int64) * PAGE
        w = tl.arange(0, PADDED)
        for begin in range(tl.program_id(1) * N, num_kept, tl.num_programs(1) * N):
            i = begin + tl.arange(0, N)
            is_kept = i < num_kept
            source = tl.load(sources + tl.load(row_kept + i, mask=is_kept, other=0), mask=is_kept)
            target = tl.load(targets + i, mask=is_kept)
            source = (source + first_place)[:, None] * W + w[None, :]
            target = (target + first_place)[:, None] * W + w[None, :]
            is_copied = is_kept[:, None] & (w < W)[None, :]
            key = tl.load(host_k + source, mask=is_copied)
            value = tl.load(host_v + source, mask=is_copied)
            tl.store(k_pool + target, key, mask=is_copied)
            tl.store(v_pool + target, value, mask=is_copied)
