"""Positions on three axes (time, height, width), as Qwen's models have them.

A text token has the same position on all axes. A visual token's are its unit's time and its place
in the grid, counted from where its run of units begins; a token that stays keeps its own, whatever
was dropped around it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dycoke_core.model.adapter import Newline, PromptLayout, Text

NUM_AXES = 3


@dataclass(frozen=True, slots=True, eq=False)
class RunPositions:
    """Positions of a run of units, counted from 0.

    Args:
        grid: int64 [3, units * N].
        next_position: of the text after it.
    """

    grid: Tensor
    next_position: int


# The positions of this many consecutive units.
PositionsOfRun = Callable[[int], RunPositions]


def prefix_positions(layout: PromptLayout, of_run: PositionsOfRun) -> Tensor:
    """Of a prefix that keeps everything: int64 [3, text + units * N], on the host."""
    parts: list[Tensor] = []
    position = 0
    for segment in layout.prefix:
        assert not isinstance(segment, Newline), "these models have none"
        if isinstance(segment, Text):
            end = position + len(segment.token_ids)
            parts.append(torch.arange(position, end).expand(NUM_AXES, -1))
            position = end
        else:
            run = of_run(len(segment.indices))
            parts.append(run.grid + position)
            position += run.next_position
    return torch.cat(parts, dim=1)


def next_position(layout: PromptLayout, of_run: PositionsOfRun) -> int:
    """Of the first token after a prefix. A video's times may reach beyond it."""
    position = 0
    for segment in layout.prefix:
        assert not isinstance(segment, Newline), "these models have none"
        if isinstance(segment, Text):
            position += len(segment.token_ids)
        else:
            position += of_run(len(segment.indices)).next_position
    return position


def kept_places(layout: PromptLayout, kept: Tensor, kept_per_unit: Sequence[int]) -> Tensor:
    """Places, among all tokens of a prefix that keeps everything, of those that stay.

    Args:
        kept: int64 [V], indices into the units * N visual tokens, unit after unit.

    Returns:
        int64 [P], on the device of `kept`; nothing waits for it.
    """
    firsts = list(accumulate(kept_per_unit, initial=0))  # of each unit in `kept`
    parts: list[Tensor] = []
    place = num_visual = 0
    for segment in layout.prefix:
        assert not isinstance(segment, Newline), "these models have none"
        if isinstance(segment, Text):
            end = place + len(segment.token_ids)
            parts.append(torch.arange(place, end, device=kept.device))
            place = end
        else:
            mine = kept[firsts[segment.indices.start] : firsts[segment.indices.stop]]
            parts.append(mine + (place - num_visual))
            size = len(segment.indices) * layout.tokens_per_unit
            place, num_visual = place + size, num_visual + size
    return torch.cat(parts)
