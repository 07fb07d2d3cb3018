"""Prefixes and seats in the pool, the slot lists that name their tokens, and stage II's state.

Owns the tables on the device that outlive a step. A prefix's list is `[visual | text]`, a seat's
`[kept | prefix text | own]`: the order does not matter to attention, as keys carry their positions.
A refresh rewrites the kept part of a seat's list; no key or value moves. Only where a prefix's
pruned layers lie in host memory has a seat rows of its own for its kept and text tokens.

A list is sent to the device when a seat first needs it, and takes a place of fixed size there, so
that graphs find it: as many places for prefixes as there are seats, since no more can be in use.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dycoke_core.compression.kv_pruning import StageTwo
from dycoke_core.engine.backend import PrefixLayout, SeatLayout
from dycoke_core.engine.backends.cuda.pool import Extent
from dycoke_core.engine.backends.cuda.staging import to_device
from dycoke_core.engine.sight import Integers

Int32s = npt.NDArray[np.int32]

NULL_SEAT = 0  # of padding rows


@dataclass(slots=True, eq=False)
class Prefix:
    """A prompt up to the question. host_extent: where its pruned layers have been moved to."""

    layout: PrefixLayout
    extent: Extent
    host_extent: Extent | None = None
    visual: tuple[range, ...] = ()  # places of the visual tokens, once it is embedded
    embeds: Tensor | None = None  # [P, D], until it is prefilled
    positions: Tensor | None = None  # int64 [axes, P], likewise
    layer_adds: Tensor | None = None  # [layers, P, D], likewise
    write_slots: Tensor | None = None  # int32 [P] in the tokens' order, likewise
    whole_runs: tuple[range, ...] = ()  # whose tokens see each other, later ones too
    token_positions: Integers | None = None  # on the host, where some layer has a window
    place: int | None = None  # of its list on the device, while seats use it
    num_seats: int = 0

    def in_list_order(self, slots: Int32s) -> Int32s:
        """Of slots in the tokens' order: visual tokens first."""
        is_visual = np.zeros(len(slots), bool)
        for run in self.visual:
            is_visual[run.start : run.stop] = True
        return np.concatenate([slots[is_visual], slots[~is_visual]])


@dataclass(slots=True, eq=False)
class Seat:
    """What one running sequence owns. front: its own copies of kept and text rows, where the
    prefix may move to host memory."""

    row: int  # in the tables on the device
    prefix: Prefix
    layout: SeatLayout
    own: Extent
    front: Extent | None
    is_listed: bool = False  # its list is on the device
    num_steps: int = 0  # decode steps that have been launched
    has_stale_rows: bool = False  # its own kept rows are what a failed step made of them
    step_row: Int32s | None = None  # its row in a step's numbers, but for what changes
    kept_copies: Tensor | None = None  # int32 [steps in flight, n_keep], for those who want them

    @property
    def stage_two(self) -> StageTwo | None:
        return self.layout.stage_two

    @property
    def num_front(self) -> int:
        """Slots that lead its list."""
        return self.layout.num_front

    @property
    def owns_kept_rows(self) -> bool:
        return self.front is not None and self.prefix.host_extent is not None

    def slots(self) -> Int32s:
        """Its list. What the first selection will write is left at 0."""
        own = self.own.slots()
        if self.stage_two is None:
            return own
        if self.owns_kept_rows:
            assert self.front is not None
            return np.concatenate([self.front.slots(), own])
        text = self.prefix.in_list_order(self.prefix.extent.slots())
        kept = np.zeros(self.stage_two.num_kept, np.int32)
        return np.concatenate([kept, text[self.prefix.layout.num_visual :], own])


@dataclass(slots=True, eq=False)
class SeatTables:
    """Slot lists and stage-II state, by seat.

    Args:
        num_seats: without the null seat.
        max_tokens: of a sequence; a list has at most this many slots.
        has_host_tier: whether prefixes may lie in host memory.
        has_windows: whether prefixes have a second list, in the order of their tokens, of which
            layers with windows read the end.
    """

    num_seats: int
    max_tokens: int
    device: torch.device
    has_host_tier: bool
    has_windows: bool = False
    slots: Tensor = field(init=False)  # int32: seats' lists, prefixes', and those in token order
    host_slots: Tensor = field(init=False)  # int32: prefixes' lists in the host's pool
    reference: Tensor = field(init=False)  # float32 [seats, max_tokens]
    kept: Tensor = field(init=False)  # int32 [seats, max_tokens]
    refreshes: Tensor = field(init=False)  # int32 [seats]
    last_ids: Tensor = field(init=False)  # int32 [seats]
    _free_rows: list[int] = field(init=False)
    _free_places: list[int] = field(init=False)

    def __post_init__(self) -> None:
        num_rows, size = self.num_seats + 1, self.max_tokens

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        num_lists = num_rows + self.num_seats * (1 + self.has_windows)
        self.slots = zeros(num_lists * size)
        self.host_slots = zeros(self.num_seats * size if self.has_host_tier else 0)
        self.reference = zeros(num_rows, size, dtype=torch.float32)
        self.kept = zeros(num_rows, size)
        self.refreshes, self.last_ids = zeros(num_rows), zeros(num_rows)
        self._free_rows = list(range(self.num_seats, NULL_SEAT, -1))
        self._free_places = list(range(self.num_seats))

    def check(self) -> None:
        """Asserts that, with no seat taken, nothing is."""
        assert len(set(self._free_rows)) == self.num_seats, "a row was not given back"
        assert len(set(self._free_places)) == self.num_seats, "a prefix's list was not given back"

    def take_row(self) -> int:
        return self._free_rows.pop()

    def leave(self, seat: Seat) -> None:
        """Frees a seat's row, and its prefix's list with the last seat that uses it."""
        self._free_rows.append(seat.row)
        prefix = seat.prefix
        if seat.is_listed:
            prefix.num_seats -= 1
            if prefix.num_seats == 0:
                assert prefix.place is not None
                self._free_places.append(prefix.place)
                prefix.place = None

    def list_seat(self, seat: Seat) -> None:
        """Sends a seat's list to the device, and its prefix's where no other seat has.

        Raises:
            Exception: an allocation failed; nothing is listed that was not before.
        """
        prefix = seat.prefix
        is_first = prefix.place is None
        if prefix.place is None:
            prefix.place = self._free_places.pop()
        try:
            if is_first:
                self._list_prefix(prefix)
            self._write(self.slots, self.seat_first(seat), seat.slots())
        except Exception:
            if is_first:
                self._free_places.append(prefix.place)
                prefix.place = None
            raise
        self.refreshes[seat.row : seat.row + 1].zero_()
        prefix.num_seats += 1
        seat.is_listed = True

    def _list_prefix(self, prefix: Prefix) -> None:
        slots = prefix.in_list_order(prefix.extent.slots())
        self._write(self.slots, self.prefix_first(prefix), slots)
        if self.has_windows:
            self._write(self.slots, self.in_order_first(prefix), prefix.extent.slots())
        if prefix.host_extent is not None:
            host_slots = prefix.in_list_order(prefix.host_extent.slots())
            self._write(self.host_slots, self.host_first(prefix), host_slots)

    def seat_first(self, seat: Seat) -> int:
        """Offset of a seat's list in `slots`."""
        return seat.row * self.max_tokens

    def prefix_first(self, prefix: Prefix) -> int:
        """Offset of a prefix's list in `slots`."""
        assert prefix.place is not None
        return (self.num_seats + 1 + prefix.place) * self.max_tokens

    def in_order_first(self, prefix: Prefix) -> int:
        """Offset of a prefix's list in the order of its tokens."""
        return self.prefix_first(prefix) + self.num_seats * self.max_tokens

    def host_first(self, prefix: Prefix) -> int:
        """Offset of a prefix's list in `host_slots`."""
        assert prefix.place is not None
        return prefix.place * self.max_tokens

    def _write(self, table: Tensor, first: int, slots: Int32s) -> None:
        table[first : first + len(slots)].copy_(to_device(slots, self.device), non_blocking=True)
