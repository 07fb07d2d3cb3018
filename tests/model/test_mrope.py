"""Positions on three axes, token by token, and places of what stays."""

import torch
from torch import Tensor

from dycoke_core.model.adapter import Clip, PromptLayout, Segment, Text, Units
from dycoke_core.model.mrope import (
    RunPositions,
    kept_places,
    next_position,
    prefix_positions,
)

ROWS, COLUMNS = 2, 3
N = ROWS * COLUMNS


def run_of(num_units: int) -> RunPositions:
    """Units one apart in time, whose text begins after the largest position."""
    places = [
        (unit, row, column)
        for unit in range(num_units)
        for row in range(ROWS)
        for column in range(COLUMNS)
    ]
    return RunPositions(torch.tensor(places).T, max(num_units, ROWS, COLUMNS))


def layout(*prefix: Segment, num_units: int) -> PromptLayout:
    return PromptLayout(Clip(num_units, 56, 84), prefix, (9,), num_units, N)


def columns(positions: Tensor) -> list[tuple[int, ...]]:
    return [tuple(column) for column in positions.T.tolist()]


def test_text_moves_on_all_axes_and_a_video_from_where_it_begins() -> None:
    prompt = layout(Text((1, 2)), Units(range(2)), Text((3,)), num_units=2)
    found = columns(prefix_positions(prompt, run_of))
    assert found[:2] == [(0, 0, 0), (1, 1, 1)]
    assert found[2:5] == [(2, 2, 2), (2, 2, 3), (2, 2, 4)]
    assert found[2 + N] == (3, 2, 2), "the next unit is one later, at the same place"
    assert found[-1] == (5, 5, 5)
    assert next_position(prompt, run_of) == 6


def test_each_run_counts_from_where_it_stands() -> None:
    prompt = layout(Units(range(1)), Text((1,)), Units(range(1, 3)), num_units=3)
    found = columns(prefix_positions(prompt, run_of))
    assert found[N] == (3, 3, 3) and found[N + 1] == (4, 4, 4)
    assert len(found) == 3 * N + 1
    assert next_position(prompt, run_of) == 4 + 3


def test_what_stays_keeps_its_place_among_all_tokens() -> None:
    prompt = layout(
        Text((1, 2)), Units(range(1)), Text((3,)), Units(range(1, 3)), Text((4,)), num_units=3
    )
    kept = torch.tensor([0, 5, 6, 13, 17])  # 2 of the first unit, 1 of the second, 2 of the third
    places = kept_places(prompt, kept, kept_per_unit=(2, 1, 2)).tolist()
    first, second = 2, 2 + N + 1
    assert places == [
        *(0, 1),
        *(first + 0, first + 5),
        first + N,
        *(second + 0, second + 7, second + 11),
        second + 2 * N,
    ]


def test_a_prefix_that_keeps_everything_has_every_place() -> None:
    prompt = layout(Text((1,)), Units(range(2)), Text((2,)), num_units=2)
    places = kept_places(prompt, torch.arange(2 * N), kept_per_unit=(N, N))
    assert places.tolist() == list(range(2 * N + 2))
    assert prefix_positions(prompt, run_of).shape == (3, 2 * N + 2)


def test_a_unit_may_keep_nothing() -> None:
    prompt = layout(Units(range(2)), Text((1,)), num_units=2)
    assert kept_places(prompt, torch.tensor([7]), kept_per_unit=(0, 1)).tolist() == [7, 2 * N]
