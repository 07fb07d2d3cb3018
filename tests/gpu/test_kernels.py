"""Kernels at the models' real sizes, which would take the interpreter too long.

`tests/gpu_kernels` runs on whatever device there is: on a GPU compiled, and in bfloat16 too.
"""

import pytest
import torch
from torch import Tensor

from dycoke_core.compression.kv_pruning import KVPruner, choose_highest, choose_lowest
from dycoke_core.gpu_kernels.attention import merge_parts, split_attend
from tests.gpu_kernels.device_selection import Selections
from tests.gpu_kernels.slot_lists import Plan, SlotPool, int32, table_row

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize("heads", [(14, 2, 64), (28, 4, 128)])
def test_attention_at_the_models_heads_is_exact_to_the_dtype(
    heads: tuple[int, int, int], tile_rows: int, dtype: torch.dtype
) -> None:
    """Rows of 1 to 3,000 slots, split as a step splits them, against float64."""
    num_heads, num_kv_heads, size = heads
    lengths, split = [1, 64, 700, 3000], 512
    pool = SlotPool(num_kv_heads, size, dtype, num_rows=20_480)
    plan = Plan(tile_rows, group=num_heads // num_kv_heads)
    lists = [pool.take(length) for length in lengths]
    for row, slots in enumerate(lists):
        first = pool.put(slots)
        for begin in range(0, len(slots), split):
            where = range(first + begin, first + min(begin + split, len(slots)))
            plan.add((0,), range(row, row + 1), where, (0, 4))
    q, scaling = pool.random((len(lengths), num_heads, size)), size**-0.5
    o, total = attend_rows(pool, plan, q, scaling)
    for row, slots in enumerate(lists):
        keys, values = (part.double() for part in pool.read(slots, 2))
        groups = num_heads // num_kv_heads
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        logits = torch.einsum("he,she->hs", q[row].double(), keys) * scaling
        expected = torch.einsum("hs,she->he", logits.softmax(-1), values)
        error = (o[row].double() - expected).norm() / expected.norm()
        assert error < (1e-2 if dtype is torch.bfloat16 else 2e-3)
        torch.testing.assert_close(total[row].double(), logits.logsumexp(-1), atol=1e-2, rtol=0)


def attend_rows(pool: SlotPool, plan: Plan, q: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """o and log totals; outputs are poisoned before, so that what is not written shows."""
    num_rows = len(q)
    items, parts, first = plan.tables(num_rows)
    shape = (len(items), pool.num_kv_heads, plan.tile_rows, pool.head_size)
    out = torch.full(shape, torch.nan, device="cuda")
    log_total = torch.full(shape[:3], torch.nan, device="cuda")
    split_attend(
        *(q, pool.keys, pool.values, pool.slots(), items, int32([len(plan.items)])),
        *(out, log_total),
        layer=2,
        list_layer=2,
        scaling=scaling,
        tile_rows=plan.tile_rows,
    )
    rows = int32([table_row(first_pruned=9)] * num_rows)
    o = torch.full_like(q, torch.nan)
    total = torch.full(q.shape[:2], torch.nan, device="cuda")
    merge_parts(
        *(out, log_total, parts, first, rows, o, total), list_layer=2, tile_rows=plan.tile_rows
    )
    return o, total


@pytest.mark.parametrize("num_visual", [1, 100, 2960, 6272])
def test_selection_is_exactly_the_pruners(num_visual: int) -> None:
    """Over stable and unstable steps and ties, at the real numbers of tokens."""
    num_kept = num_visual * 3 // 10
    pruners = [KVPruner(num_visual, num_kept, 0.9, choose_highest)]
    pruners += [KVPruner(num_visual, num_kept, None, choose_highest)]
    pruners += [KVPruner(num_visual, num_kept, 0.9, choose_lowest)]
    selections = Selections(pruners, stride=6400)
    generator = torch.Generator().manual_seed(num_visual)
    for step in range(6):
        scores = torch.rand(num_visual, generator=generator) ** 8 / num_visual
        if step % 2:  # many ties
            scores = (scores * num_visual * 50).floor() / (50 * num_visual)
        selections.step([scores] * 3)
        selections.step([scores * 1.01] * 3)
