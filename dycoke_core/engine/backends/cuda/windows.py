"""Which slots tokens read in layers with windows: the ends of two lists.

Such a layer needs no mask: what a token sees of its prefix is the end of a list in the order of the
tokens, and of its seat's own part the end as well. So the items of `tiles` name just these.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dycoke_core.engine.backends.cuda.seats import Seat, SeatTables
from dycoke_core.engine.backends.cuda.tiles import TileRows
from dycoke_core.engine.sight import first_seen


class SeatWindow(NamedTuple):
    """What one token of a seat reads: offsets in SLOTS, and how many from there."""

    prefix_first: int
    prefix_length: int
    own_first: int
    num_own: int


def seat_window(seat: Seat, tables: SeatTables, index: int, window: int) -> SeatWindow:
    """Args: index: of the token among the seat's own."""
    layout, positions = seat.prefix.layout, seat.prefix.token_positions
    assert positions is not None
    position = np.array([layout.next_position + index])
    first = int(first_seen(positions, position, window)[0])
    hidden = max(index + 1 - window, 0)
    return SeatWindow(
        tables.in_order_first(seat.prefix) + first,
        layout.num_tokens - first,
        tables.seat_first(seat) + seat.num_front + hidden,
        index + 1 - hidden,
    )


def rows_in_windows(windows: Sequence[SeatWindow], num_layers: int) -> TileRows:
    columns = np.array(windows, np.int64).reshape(-1, len(SeatWindow._fields))
    nothing = np.zeros(len(columns), np.int64)
    return TileRows(
        prefix_first=columns[:, 0],
        prefix_length=columns[:, 1],
        first_pruned=nothing + num_layers,  # windows are never pruned
        seat_first=columns[:, 2],
        num_front=nothing,
        num_own=columns[:, 3],
    )
