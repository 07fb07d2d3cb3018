"""Runs `gate_select` and the project's own `KVPruner` on the same rows, and compares exactly."""

import torch
from torch import Tensor

from dycoke_core.compression.kv_pruning import KVPruner, choose_lowest
from dycoke_core.gpu_kernels import rows as layout
from dycoke_core.gpu_kernels.selection import gate_select
from tests.gpu_kernels.slot_lists import DEVICE, int32, table_row

LAYER = 2


class Selections:
    """Sequences that select in every step, on seats 1, 2, …, in the kernel and in the pruner."""

    def __init__(self, pruners: list[KVPruner], stride: int) -> None:
        self.pruners, num_seats = pruners, len(pruners) + 1
        self.scores = torch.zeros(len(pruners), stride, device=DEVICE)
        # What an earlier sequence left on these seats.
        self.reference = torch.ones(num_seats, stride, device=DEVICE)
        self.kept = torch.full((num_seats, stride), -7, dtype=torch.int32, device=DEVICE)
        self.refreshes = int32([9] * num_seats)
        self.changed = int32([5] * len(pruners))
        generator = torch.Generator().manual_seed(0)
        num_visual = sum(p.num_visual_tokens for p in pruners)
        num_kept = sum(p.num_kept for p in pruners)
        visual = torch.randint(-9999, 9999, (num_visual,), generator=generator)
        untouched = torch.full((num_kept + len(pruners),), 12345)  # one more slot after each list
        self.slots = torch.cat([visual, untouched]).to(DEVICE, torch.int32)

    def step(self, scores: list[Tensor]) -> None:
        """One decode step of every sequence; asserts that kernel and pruner did the same."""
        rows, given = [], []
        visual_first, kept_first = 0, sum(p.num_visual_tokens for p in self.pruners)
        for index, (pruner, row_scores) in enumerate(zip(self.pruners, scores, strict=True)):
            num_visual = pruner.num_visual_tokens
            self.scores[index, :num_visual] = row_scores
            choice = layout.LOWEST if pruner.choose is choose_lowest else layout.HIGHEST
            if not hasattr(pruner.choose, "__name__"):  # a RandomChoice
                choice = layout.GIVEN
                places = pruner.choose(row_scores, pruner.num_kept, pruner.num_steps)
            rows.append(
                table_row(
                    seat=index + 1,
                    scoring_layer=LAYER,
                    num_visual=num_visual,
                    num_kept=pruner.num_kept,
                    visual_first=visual_first,
                    kept_first=kept_first,
                    threshold=2.0 if pruner.threshold is None else pruner.threshold,
                    choice=choice,
                    given_first=len(given),
                    flags=layout.FIRST_STEP * (pruner.num_steps == 0)
                    + layout.ONE_SHOT * (pruner.threshold is None),
                )
            )
            given += places.tolist() if choice == layout.GIVEN else []
            visual_first += num_visual
            kept_first += pruner.num_kept + 1
        gate_select(
            int32(rows),
            *(self.scores, self.reference, self.kept, self.slots, int32(given or [0])),
            *(self.refreshes, self.changed),
            layer=LAYER,
        )
        for index, row in enumerate(rows):
            self._compare(index, row, scores[index])

    def _compare(self, index: int, row: list[int], scores: Tensor) -> None:
        pruner, num_visual, num_kept = (
            self.pruners[index],
            row[layout.NUM_VISUAL],
            row[layout.NUM_KEPT],
        )
        changed = pruner.update(scores.clone())
        assert pruner.kept is not None and pruner.reference is not None
        assert bool(self.changed[index]) == bool(changed)
        kept = self.kept[index + 1]
        assert kept[:num_kept].tolist() == pruner.kept.tolist()
        assert (kept[num_kept:] == -7).all()
        assert torch.equal(self.reference[index + 1, :num_visual], pruner.reference.to(DEVICE))
        assert int(self.refreshes[index + 1]) == int(pruner.num_refreshes)
        first, visual = row[layout.KEPT_FIRST], self.slots[row[layout.VISUAL_FIRST] :]
        assert torch.equal(self.slots[first : first + num_kept], visual[kept[:num_kept].long()])
        assert self.slots[first + num_kept] == 12345
