"""Stage II's gate and choice on the device, for the rows whose SCORING_LAYER is the layer.

Decides as `compression.kv_pruning` does: equal scores by lower index, a refresh if the cosine falls
below the threshold. A cosine's sums may differ from a CPU's in the last bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dycoke_core.gpu_kernels.columns import (
    CHOICE,
    FIRST_STEP,
    FLAGS,
    GIVEN,
    GIVEN_FIRST,
    KEPT_FIRST,
    KEPT_IN_OWN_ROWS,
    LOWEST,
    NO_LAYER,
    NUM_KEPT,
    NUM_VISUAL,
    ONE_SHOT,
    ROW_COLUMNS,
    SCORING_LAYER,
    SEAT,
    THRESHOLD,
    VISUAL_FIRST,
)
from dycoke_core.gpu_kernels.launch import check_rows, check_tensors, launch, require

_MAX_TILE = 4096  # scores


def gate_select(
    rows: Tensor,
    scores: Tensor,
    reference: Tensor,
    kept: Tensor,
    slots: Tensor,
    given: Tensor,
    refreshes: Tensor,
    changed: Tensor,
    *,
    layer: int,
) -> None:
    """Compares each scoring row's scores with those of its last selection; selects where needed.

    A selection writes the row's `reference`, `kept` and the first NUM_KEPT slots of its seat's list
    (unless KEPT_IN_OWN_ROWS), and counts a refresh; the first one sets the count to 0, so a seat's
    state needs no clearing. One program per row; the NUM_KEPT-th score is found bit by bit, in 31
    passes over scores that stay in the L1 cache.

    Args:
        rows: int32 [B, ROW_COLUMNS]; NUM_KEPT at most V.
        scores: float32 [B, stride], not negative.
        reference: float32 [seats, stride].
        kept: int32 [seats, stride], places among the V, ascending.
        slots: int32 [*].
        given: int32 [*], the places that rows with CHOICE = GIVEN select, ascending.
        refreshes: int32 [seats].
        changed: int32 [B], 1 if the kept set was selected now. Rows that score in no layer get 0.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Source: paper section 3.3, `compression.kv_pruning.KVPruner`.
    """
    num_rows, stride = scores.shape
    check_rows(rows, num_rows)
    require(reference.shape[1] == stride == kept.shape[1], "state must have the scores' stride")
    require(reference.shape[0] == kept.shape[0] == refreshes.shape[0], "state must be per seat")
    require(changed.shape == (num_rows,), "changed must be [B]")
    check_tensors(torch.float32, scores=scores, reference=reference)
    integers = {"kept": kept, "slots": slots, "given": given}
    check_tensors(torch.int32, refreshes=refreshes, changed=changed, **integers)
    tile = min(triton.next_power_of_2(stride), _MAX_TILE)
    launch(
        gate_select_kernel,
        (num_rows,),
        rows,
        scores,
        reference,
        kept,
        slots,
        given,
        refreshes,
        changed,
        layer,
        scores.stride(0),
        stride,
        N=tile,
        num_warps=max(1, tile // 256),
    )


@triton.jit(do_not_specialize=["layer"])
def gate_select_kernel(
    rows,
    scores,
    reference,
    kept,
    slots,
    given,
    refreshes,
    changed,
    layer,
    scores_stride,
    seat_stride,
    N: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    row = rows + b * ROW_COLUMNS
    scoring_layer = tl.load(row + SCORING_LAYER)
    if scoring_layer == NO_LAYER:
        tl.store(changed + b, 0)
    if scoring_layer == layer:
        seat = tl.load(row + SEAT).to(tl.int64)
        num_visual = tl.load(row + NUM_VISUAL)
        num_kept = tl.load(row + NUM_KEPT)
        flags = tl.load(row + FLAGS)
        choice = tl.load(row + CHOICE)
        row_scores = scores + b * scores_stride
        row_reference = reference + seat * seat_stride
        row_kept = kept + seat * seat_stride
        is_first = (flags & FIRST_STEP) != 0
        threshold = tl.load(row + THRESHOLD).to(tl.float32, bitcast=True)
        agree = _scores_agree(row_scores, row_reference, num_visual, threshold, N)
        is_first = (flags & FIRST_STEP) != 0
        selects = is_first | (((flags & ONE_SHOT) == 0) & (agree == 0))
        tl.store(changed + b, selects.to(tl.int32))
        if selects:
            visual_slots = slots + tl.load(row + VISUAL_FIRST)
            kept_slots = slots + tl.load(row + KEPT_FIRST)
            num_written = tl.where((flags & KEPT_IN_OWN_ROWS) == 0, num_kept, 0)
            i = tl.arange(0, N)
            for begin in range(0, num_visual, N):
                is_visual = begin + i < num_visual
                score = tl.load(row_scores + begin + i, mask=is_visual, other=0.0)
                tl.store(row_reference + begin + i, score, mask=is_visual)
            if choice == GIVEN:
                places = given + tl.load(row + GIVEN_FIRST)
                for begin in range(0, num_kept, N):
                    is_kept = begin + i < num_kept
                    place = tl.load(places + begin + i, mask=is_kept, other=0)
                    slot = tl.load(visual_slots + place, mask=is_kept, other=0)
                    tl.store(row_kept + begin + i, place, mask=is_kept)
                    tl.store(kept_slots + begin + i, slot, mask=begin + i < num_written)
            else:
                last = _last_kept(row_scores, num_visual, num_kept, choice, N)
                above = tl.zeros([N], tl.int32)
                for begin in range(0, num_visual, N):
                    above += (_keys(row_scores, begin, num_visual, choice, N) > last).to(tl.int32)
                ties_left = num_kept - tl.sum(above)
                num_chosen = 0
                for begin in range(0, num_visual, N):
                    keys = _keys(row_scores, begin, num_visual, choice, N)
                    is_tie = (keys == last).to(tl.int32)
                    is_kept = (keys > last) | ((is_tie != 0) & (tl.cumsum(is_tie, 0) <= ties_left))
                    rank = num_chosen + tl.cumsum(is_kept.to(tl.int32), 0) - 1
                    slot = tl.load(visual_slots + begin + i, mask=is_kept, other=0)
                    tl.store(row_kept + rank, begin + i, mask=is_kept)
                    tl.store(kept_slots + rank, slot, mask=is_kept & (rank < num_written))
                    ties_left -= tl.sum(is_tie)
                    num_chosen += tl.sum(is_kept.to(tl.int32))
            # A seat keeps its last sequence's count until the next sequence's first selection.
            count = tl.where(is_first, 0, tl.load(refreshes + seat) + 1)
            tl.store(refreshes + seat, count)


@triton.jit
def _scores_agree(row_scores, row_reference, num_visual, threshold, N: tl.constexpr):
    """Whether the cosine reaches the threshold; never at zero norm."""
    product = tl.zeros([N], tl.float32)
    square = tl.zeros([N], tl.float32)
    reference_square = tl.zeros([N], tl.float32)
    for begin in range(0, num_visual, N):
        i = begin + tl.arange(0, N)
        score = tl.load(row_scores + i, mask=i < num_visual, other=0.0)
        before = tl.load(row_reference + i, mask=i < num_visual, other=0.0)
        product += score * before
        square += score * score
        reference_square += before * before
    norms = tl.sqrt(tl.sum(square)) * tl.sqrt(tl.sum(reference_square))
    return (norms > 0) & (tl.sum(product) >= threshold * norms)


@triton.jit
def _keys(row_scores, begin, num_visual, choice, N: tl.constexpr):
    """Integers from 0 on; the greatest are kept first. -1 beyond V.

    The bits of non-negative floats order like the floats.
    """
    i = begin + tl.arange(0, N)
    score = tl.load(row_scores + i, mask=i < num_visual, other=0.0)
    bits = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    keys = tl.where(choice == LOWEST, 0x7FFFFFFF - bits, bits)
    return tl.where(i < num_visual, keys, -1)


@triton.jit
def _last_kept(row_scores, num_visual, num_kept, choice, N: tl.constexpr):
    """The greatest key that at least num_kept keys reach, found from its highest bit down."""
    last = 0
    for step in range(31):
        candidate = last | (1 << (30 - step))
        reached = tl.zeros([N], tl.int32)
        for begin in range(0, num_visual, N):
            reached += (_keys(row_scores, begin, num_visual, choice, N) >= candidate).to(tl.int32)
        last = tl.where(tl.sum(reached) >= num_kept, candidate, last)
    return last
