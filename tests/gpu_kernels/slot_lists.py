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
    """A row of ROWS: an idle one, as padding has it, but for the named columns."""
    row = [0] * layout.ROW_COLUMNS
    row[layout.SCORING_LAYER] = layout.NO_LAYER
    row[layout.TOKEN_ID] = layout.LAST_TOKEN
    for name, value in columns.items():
        bits = struct.unpack("<i", struct.pack("<f", value))[0] if name == "threshold" else value
        row[getattr(layout, name.upper())] = int(bits)
    return row
