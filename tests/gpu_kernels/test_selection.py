"""The gate and the choice on the device: exactly those of `KVPruner`."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dycoke_core.compression.kv_pruning import (
    KVPruner,
    RandomChoice,
    choose_highest,
    choose_lowest,
)
from dycoke_core.gpu_kernels import rows as layout
from dycoke_core.gpu_kernels.selection import gate_select
from tests.gpu_kernels.device_selection import LAYER, Selections
from tests.gpu_kernels.slot_lists import DEVICE, int32, table_row

CHOICES = [choose_highest, choose_lowest, RandomChoice(3)]


def drifting(num_visual: int, seed: int) -> Iterator[Tensor]:
    """Steps that agree with the one before and, every third, one that does not."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_visual, generator=generator) ** 4 / num_visual
    while True:
        for _ in range(2):
            yield scores
            scores = scores * (1 + 0.1 * torch.rand(num_visual, generator=generator))
        scores = torch.rand(num_visual, generator=generator) ** 8 / num_visual


def test_every_choice_and_size_over_several_steps() -> None:
    sizes = [(1, 1), (1, 0), (63, 20), (64, 64), (65, 0), (128, 127)]
    pruners = [KVPruner(*size, 0.9, choose) for choose in CHOICES for size in sizes]
    pruners += [KVPruner(100, 30, None, choose) for choose in CHOICES]
    selections = Selections(pruners, stride=200)
    steps = [drifting(pruner.num_visual_tokens, seed) for seed, pruner in enumerate(pruners)]
    for _ in range(5):
        selections.step([next(scores) for scores in steps])
    assert any(int(p.num_refreshes) > 1 for p in pruners)


@pytest.mark.parametrize("num_visual", [4095, 4096, 4097, 9000])
def test_more_tokens_than_a_tile(num_visual: int) -> None:
    pruners = [KVPruner(num_visual, num_visual // 3, 0.9, choose) for choose in CHOICES]
    selections = Selections(pruners, stride=9000)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):  # with some ties in each tile
        scores = torch.randint(0, 900, (num_visual,), generator=generator) / 1e6
        selections.step([scores] * 3)


def test_equal_scores_and_a_zero_norm() -> None:
    pruners = [KVPruner(50, 20, 0.9, choose) for choose in CHOICES]
    selections = Selections(pruners, stride=64)
    equal, zero = torch.full((50,), 0.25), torch.zeros(50)
    for scores in (equal, equal, zero, zero, equal):
        selections.step([scores] * 3)
    assert [int(p.num_refreshes) for p in pruners] == [3] * 3  # at zero norm always


@pytest.mark.parametrize(("threshold", "second"), [(1.0, (1.0, 0.0)), (0.0, (0.0, 1.0))])
def test_a_cosine_at_the_threshold_keeps_the_set(
    threshold: float, second: tuple[float, float]
) -> None:
    pruner = KVPruner(2, 1, threshold)
    selections = Selections([pruner], stride=4)
    for scores in ((1.0, 0.0), second):
        selections.step([torch.tensor(scores)])
    assert int(pruner.num_refreshes) == 0


def run(rows: list[list[int]], changed: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scores = torch.rand(len(rows), 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    reference, kept = torch.zeros(9, 16, device=DEVICE), int32([[-7] * 16] * 9)
    refreshes = int32([0] * 9)
    gate_select(
        *(int32(rows), scores, reference, kept, slots, int32([0]), refreshes, changed),
        layer=LAYER,
    )
    return reference, kept, refreshes


def test_rows_that_score_elsewhere_or_not_at_all_are_left_alone() -> None:
    fields = {"num_visual": 10, "num_kept": 4, "kept_first": 20, "threshold": 0.9}
    rows = [
        table_row(seat=1, scoring_layer=LAYER + 1, flags=layout.FIRST_STEP, **fields),
        table_row(seat=2, flags=layout.FIRST_STEP, **fields),
        table_row(),  # padding
    ]
    changed, slots = int32([5, 5, 5]), int32(list(range(40)))
    reference, kept, refreshes = run(rows, changed, slots)
    assert changed.tolist() == [5, 0, 0]  # the first row's is due in its own layer
    assert (reference == 0).all() and (kept == -7).all() and (refreshes == 0).all()
    assert slots.tolist() == list(range(40))


def test_kept_tokens_in_rows_of_their_own_keep_their_slots() -> None:
    flags = layout.FIRST_STEP | layout.KEPT_IN_OWN_ROWS
    row = table_row(
        seat=3, scoring_layer=LAYER, num_visual=10, num_kept=4, kept_first=20, flags=flags
    )
    changed, slots = int32([0]), int32(list(range(40)))
    _, kept, _ = run([row], changed, slots)
    assert changed.tolist() == [1] and (kept[3, :4] >= 0).all()
    assert slots.tolist() == list(range(40))
