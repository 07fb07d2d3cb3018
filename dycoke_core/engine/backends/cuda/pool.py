"""One pool of keys and values for all layers, and which of its rows are taken.

A *page* holds PAGE tokens in the layers [a, b): (b - a) * PAGE consecutive rows, layer after layer.
A *slot* names a token in all layers of its page at once: its row in layer t is `slot + t * PAGE`.
So the slots of a page that starts at row r are `r - a * PAGE` and those that follow; where a page
lacks the first layers they may be negative.

Tokens are allocated as an `Extent`, whose pages may lie anywhere: first fit from the low end, over
free rows kept as coalesced runs. Extents of one height (number of layers) never fragment the pool:
where all have it, bytes that suffice always do. Heights that mix do fragment it: in a simulation of
prefixes and seats of three heights, at 92 % use, every second allocation was refused whose rows
were free. Where heights mix, only an allocation proves that there is room.

Owns the memory and knows no sequence, no budget and no stream: freed rows may be handed out at
once. The caller that frees them knows that no kernel in flight reads them, or that the next writes
to them are queued after it on the same stream.

Allocating 100 pages among 100,000 takes 0.02 ms of one core in a tidy pool and 0.13 ms where every
other page is free; freeing them 0.02 and 0.19 ms.

What is not covered: moving live pages.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dycoke_core.engine.backends.cuda.staging import to_device
from dycoke_core.gpu_kernels.rows import PAGE

_MAX_ROWS = 2**31 - 1  # slots are int32

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowShape:
    num_layers: int  # T
    num_kv_heads: int  # G
    head_size: int  # E
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of one token in one layer, keys and values."""
        return 2 * self.num_kv_heads * self.head_size * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """Room for tokens in the layers [first_layer, end_layer)."""

    num_tokens: int
    first_layer: int
    end_layer: int
    page_rows: Integers  # [pages], the first row of each, ascending

    @property
    def num_layers(self) -> int:
        return self.end_layer - self.first_layer

    @property
    def rows_per_page(self) -> int:
        return self.num_layers * PAGE

    @property
    def num_rows(self) -> int:
        return len(self.page_rows) * self.rows_per_page

    def slots(self) -> npt.NDArray[np.int32]:
        """[num_tokens], in the tokens' order."""
        firsts = self.page_rows - self.first_layer * PAGE
        slots = (firsts[:, None] + np.arange(PAGE)).reshape(-1)
        return slots[: self.num_tokens].astype(np.int32)


class KVPool:
    """Keys and values, [R, G, E] each, and the allocator of their R rows.

    One page of all layers is set aside: `trash_slot` takes what padding rows write.
    """

    def __init__(
        self, shape: RowShape, num_rows: int, device: torch.device, *, is_pinned: bool = False
    ) -> None:
        if not shape.num_layers * PAGE <= num_rows <= _MAX_ROWS:
            raise ValueError(f"{num_rows} rows: a pool has a page of all layers, and under 2^31")
        self.shape = shape
        self.num_rows = num_rows
        # Zeros, so that no masked read ever meets a NaN. Pinned memory would take seconds to fill.
        make = torch.empty if is_pinned else torch.zeros
        size = (num_rows, shape.num_kv_heads, shape.head_size)
        self.keys: Tensor = make(size, dtype=shape.dtype, device=device, pin_memory=is_pinned)
        self.values: Tensor = make(size, dtype=shape.dtype, device=device, pin_memory=is_pinned)
        self._free = _FreeRuns(num_rows)
        self._live: dict[Extent, None] = {}
        trash = self.allocate(1, 0, shape.num_layers)
        assert trash is not None
        self._trash = trash
        self.trash_slot = int(trash.slots()[0])

    @classmethod
    def within(cls, max_bytes: int, shape: RowShape, device: torch.device) -> "KVPool":
        """The largest pool of at most `max_bytes`, the page set aside included."""
        return cls(shape, min(max_bytes // shape.num_bytes, _MAX_ROWS), device)

    @classmethod
    def pinned(cls, max_bytes: int, shape: RowShape) -> "KVPool":
        """A pool in pinned host memory, or in plain memory where there is no CUDA device.

        PyTorch's pinned allocator rounds a tensor up to a power of two, so keys and values take the
        largest power of two within half of `max_bytes` each.
        """
        tensor_bytes = 1 << max((max_bytes // 2).bit_length() - 1, 0)
        num_rows = min(2 * tensor_bytes // shape.num_bytes, _MAX_ROWS)
        device = torch.device("cpu")
        return cls(shape, num_rows, device, is_pinned=torch.cuda.is_available())

    @property
    def free_rows(self) -> int:
        return self._free.num_rows

    @property
    def free_bytes(self) -> int:
        return self.free_rows * self.shape.num_bytes

    @property
    def usable_bytes(self) -> int:
        """All that extents can ever hold."""
        return (self.num_rows - self._trash.num_rows) * self.shape.num_bytes

    def bytes_of(self, num_tokens: int, num_layers: int) -> int:
        """Of an extent: whole pages, as a reservation has to count them."""
        return num_pages(num_tokens) * num_layers * PAGE * self.shape.num_bytes

    def allocate(self, num_tokens: int, first_layer: int, end_layer: int) -> Extent | None:
        """Room for tokens in some layers; None, and nothing taken, where there is none."""
        if num_tokens < 0 or not 0 <= first_layer < end_layer <= self.shape.num_layers:
            raise ValueError(f"{num_tokens} tokens in layers {first_layer} to {end_layer}")
        height = (end_layer - first_layer) * PAGE
        rows = self._free.take(num_pages(num_tokens), height)
        if rows is None:
            return None
        extent = Extent(num_tokens, first_layer, end_layer, rows)
        self._live[extent] = None
        return extent

    def low_layers(self, extent: Extent, end_layer: int) -> Extent | None:
        """Copies an extent's layers below `end_layer` to pages of their own, and frees the extent.

        None, and nothing changed, where there is no room for the copy. Cut where they lie, they
        would leave holes that fit no page of all layers.

        Raises:
            Exception: an allocation failed; nothing has changed.
        """
        assert extent.first_layer < end_layer <= extent.end_layer
        copy = self.allocate(extent.num_tokens, extent.first_layer, end_layer)
        if copy is None:
            return None
        try:
            self._copy_low_layers(extent, copy)
        except Exception:
            self.free(copy)
            raise
        self.free(extent)
        return copy

    def _copy_low_layers(self, source: Extent, target: Extent) -> None:
        rows = np.arange(target.rows_per_page)
        sources, targets = (
            to_device((pages[:, None] + rows).reshape(-1), self.keys.device)
            for pages in (source.page_rows, target.page_rows)
        )
        for tensor in (self.keys, self.values):
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))

    def free(self, extent: Extent) -> None:
        assert extent in self._live, "an extent is freed once, in its own pool"
        del self._live[extent]
        self._free.put(extent.page_rows, extent.rows_per_page)

    @property
    def num_live_extents(self) -> int:
        """Rows that are still to be freed; the page set aside is not among them."""
        return len(self._live) - 1

    def check(self) -> None:
        """Asserts that live and free rows are all rows, each once, and that free runs are whole.

        Takes milliseconds where thousands of extents live: for an idle engine and for tests.
        """
        self._free.check()
        heights = [np.full(len(e.page_rows), e.rows_per_page) for e in self._live]
        starts = np.concatenate([self._free.starts, *(e.page_rows for e in self._live)])
        lengths = np.concatenate([self._free.lengths, *heights])
        order = np.argsort(starts)
        ends = starts[order] + lengths[order]
        assert starts[order[0]] == 0 and ends[-1] == self.num_rows, "rows have been lost"
        assert np.array_equal(ends[:-1], starts[order[1:]]), "rows overlap or have been lost"


class _FreeRuns:
    """Free rows as runs of consecutive ones, ascending; two runs never touch."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.starts: Integers = np.zeros(1, np.int64)
        self.lengths: Integers = np.full(1, num_rows, np.int64)

    def take(self, num_pages: int, height: int) -> Integers | None:
        """First rows, ascending, of this many pages of `height` rows; None if they do not fit."""
        if num_pages == 0:
            return np.zeros(0, np.int64)
        fitting = self.lengths // height  # pages per run
        cumulative = np.cumsum(fitting)
        if not len(cumulative) or cumulative[-1] < num_pages:
            return None
        num_runs = int(np.searchsorted(cumulative, num_pages)) + 1  # that are needed
        counts = fitting[:num_runs]
        before = cumulative[:num_runs] - counts
        counts[-1] = num_pages - before[-1]
        places = np.arange(num_pages) - np.repeat(before, counts)  # of each page in its run
        rows = np.repeat(self.starts[:num_runs], counts) + places * height
        self.starts[:num_runs] += counts * height
        self.lengths[:num_runs] -= counts * height
        self.num_rows -= num_pages * height
        if not self.lengths[:num_runs].all():
            is_left = self.lengths > 0
            self.starts, self.lengths = self.starts[is_left], self.lengths[is_left]
        return rows

    def put(self, pages: Integers, height: int) -> None:
        """Takes pages back, given by their first rows, ascending."""
        starts, ends = _joined(pages, pages + height)
        places = np.searchsorted(self.starts, starts)
        all_starts = np.insert(self.starts, places, starts)
        all_ends = np.insert(self.starts + self.lengths, places, ends)
        assert (all_ends[:-1] <= all_starts[1:]).all(), "rows were free already"
        self.starts, all_ends = _joined(all_starts, all_ends)
        self.lengths = all_ends - self.starts
        self.num_rows += len(pages) * height

    def check(self) -> None:
        ends = self.starts + self.lengths
        assert (self.lengths > 0).all() and (ends[:-1] < self.starts[1:]).all(), "runs touch"
        assert int(self.lengths.sum()) == self.num_rows


def _joined(starts: Integers, ends: Integers) -> tuple[Integers, Integers]:
    """Runs, ascending, with those that touch made one."""
    is_apart = ends[:-1] != starts[1:]
    edge = np.ones(min(len(starts), 1), bool)
    return starts[np.concatenate([edge, is_apart])], ends[np.concatenate([is_apart, edge])]


def num_pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE)
