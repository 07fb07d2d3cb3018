"""Scores of the visual tokens on the device: those of `compression.kv_pruning`."""

import pytest
import torch

from dycoke_core.compression import kv_pruning
from dycoke_core.gpu_kernels.scoring import visual_scores
from tests.gpu_kernels.slot_lists import DEVICE, DTYPES, SlotPool, int32, table_row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(14, 2), (4, 4), (20, 1)])
def test_scores_are_the_mean_weights_of_the_heads(
    num_heads: int, num_kv_heads: int, dtype: torch.dtype
) -> None:
    pool = SlotPool(num_kv_heads, 16, dtype)
    sizes = [1, 63, 64, 65, 130]
    lists = [pool.take(size + 3) for size in sizes]  # three tokens of text before
    rows = [
        table_row(scoring_layer=3, num_visual=size, visual_first=pool.put(slots) + 3)
        for size, slots in zip(sizes, lists, strict=True)
    ]
    rows[2] = table_row(scoring_layer=2, num_visual=64)
    q = pool.random((5, num_heads, 16))
    total = torch.rand(5, num_heads, generator=pool.generator).to(DEVICE) + 5
    scores = torch.full((5, 150), 7.0, device=DEVICE)
    visual_scores(q, pool.keys, pool.slots(), int32(rows), total, scores, layer=3, scaling=0.25)
    for row, (size, slots) in enumerate(zip(sizes, lists, strict=True)):
        if row == 2:  # it scores in another layer
            assert (scores[row] == 7).all()
            continue
        keys, _ = pool.read(slots[3:], 3)
        packed = q[row].view(num_kv_heads, -1, 16)
        expected = kv_pruning.visual_scores(
            packed, keys, total[row].view(num_kv_heads, -1), scaling=0.25
        )
        torch.testing.assert_close(scores[row, :size], expected, rtol=2e-5, atol=1e-9)
        assert (scores[row, size:] == 7).all()


def test_few_programs_take_all_tiles() -> None:
    pool = SlotPool(1, 16, num_rows=40 * 256)
    slots = pool.take(300)
    row = table_row(scoring_layer=0, num_visual=300, visual_first=pool.put(slots))
    num_rows = 500  # so many that each has two programs for its five tiles
    rows = int32([row] + [table_row()] * (num_rows - 1))
    q = pool.random((num_rows, 2, 16))
    total, scores = torch.full((num_rows, 2), 5.0, device=DEVICE), torch.zeros(num_rows, 400)
    scores = scores.to(DEVICE)
    visual_scores(q, pool.keys, pool.slots(), rows, total, scores, layer=0, scaling=0.25)
    keys, _ = pool.read(slots, 0)
    expected = kv_pruning.visual_scores(q[0][None], keys, total[0][None], scaling=0.25)
    torch.testing.assert_close(scores[0, :300], expected, rtol=2e-5, atol=1e-9)
    assert (scores[1:] == 0).all()
