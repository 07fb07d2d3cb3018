"""A pool of keys and values with lists of slots in it, as the kernels' tests need them."""

import struct
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dycoke_core.gpu_kernels import rows as layout
from dycoke_core.gpu_kernels.rows import PAGE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@dataclass(eq=False)
class SlotPool:
    """Pages at random rows; each is good for a range of layers, so that slots may be negative."""

    num_kv_heads: int
    head_size: int
    dtype: torch.dtype = torch.float32
    num_rows: int = 200 * PAGE
    seed: int = 0
    keys: Tensor = field(init=False)  # [R, G, E]
    values: Tensor = field(init=False)
    lists: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        shape = (self.num_rows, self.num_kv_heads, self.head_size)
        self.keys = self.random(shape)
        self.values = self.random(shape)
        blocks = torch.randperm(self.num_rows // (4 * PAGE), generator=self.generator)
        self._free = (blocks * 4 * PAGE).tolist()

    def random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE, self.dtype)

    def take(self, num_slots: int, layers: tuple[int, int] = (0, 4)) -> list[int]:
        """Slots in a shuffled order, on pages for at most four layers [a, b)."""
        first, end = layers
        assert 0 < end - first <= 4
        slots: list[int] = []
        while len(slots) < num_slots:
            page = self._free.pop() - first * PAGE
            order = torch.randperm(PAGE, generator=self.generator)
            slots += [page + int(place) for place in order]
        return slots[:num_slots]

    def put(self, slots: list[int]) -> int:
        """Appends a list to SLOTS; where it begins."""
        self.lists += slots
        return len(self.lists) - len(slots)

    def slots(self) -> Tensor:
        return int32(self.lists or [0])

    def read(self, slots: list[int], layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values, [S, G, E], of a list in a layer."""
        places = torch.tensor(slots, dtype=torch.long) + layer * PAGE
        assert len(slots) == 0 or (int(places.min()) >= 0 and int(places.max()) < self.num_rows)
        places = places.to(DEVICE)
        return self.keys[places], self.values[places]


def int32(values: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def table_row(**columns: int | float) -> list[int]:
    """A row of ROWS: idle like padding, except for the named columns."""
    row = [0] * layout.ROW_COLUMNS
    row[layout.SCORING_LAYER] = layout.NO_LAYER
    row[layout.TOKEN_ID] = layout.LAST_TOKEN
    for name, value in columns.items():
        bits = struct.unpack("<i", struct.pack("<f", value))[0] if name == "threshold" else value
        row[getattr(layout, name.upper())] = int(bits)
    return row


def slow_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """One row's attention in float64 loops over heads: [H, E] and its log totals, [H].

    Args:
        query: [H, E]; keys, values: [S, G, E].
    """
    num_heads, head_size = query.shape
    output = torch.zeros(num_heads, head_size, dtype=torch.float64, device=query.device)
    totals = torch.full((num_heads,), -torch.inf, dtype=torch.float64, device=query.device)
    for head in range(num_heads):
        g = head * keys.shape[1] // num_heads
        logits = keys[:, g].double() @ query[head].double() * scaling
        if len(logits):
            output[head] = logits.softmax(0) @ values[:, g].double()
            totals[head] = logits.logsumexp(0)
    return output, totals


@dataclass
class Plan:
    """Items and parts of a step, put together row by row."""

    tile_rows: int  # M
    group: int  # R, query heads per key/value head
    items: list[list[int]] = field(default_factory=list)
    parts: tuple[dict[int, list[int]], dict[int, list[int]]] = field(
        default_factory=lambda: ({}, {})
    )

    def add(
        self,
        sides: tuple[int, ...],
        rows: range,
        slots: range,
        layers: tuple[int, int],
        causal: int | None = None,
    ) -> None:
        """One item; it is a part of its rows on the given sides."""
        assert len(rows) <= self.tile_rows // self.group
        for j, row in enumerate(rows):
            for side in sides:
                part = len(self.items) * self.tile_rows + j * self.group
                self.parts[side].setdefault(row, []).append(part)
        seen = len(slots) if causal is None else causal
        self.items.append([rows.start, len(rows), slots.start, len(slots), *layers, seen, 0])

    def tables(self, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """items [cap, 8], parts [*] and first [2, B + 1]; two items beyond the plan's are junk."""
        parts: list[int] = []
        first: list[list[int]] = [[0], [0]]
        for side in (0, 1):
            first[side][0] = len(parts)
            for row in range(num_rows):
                parts += self.parts[side].get(row, [])
                first[side].append(len(parts))
        junk = [[0, 1, 0, 1_000_000, -9, 99, 5, 0]] * 2
        return int32(self.items + junk), int32(parts or [0]), int32(first)
