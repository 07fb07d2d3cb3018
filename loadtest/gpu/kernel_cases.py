"""Each kernel on inputs of a decode step's size, with the bytes that it must move.

Inputs are random, never zeros. For kernels bound by the device's memory (attention and scores) they
are larger than any L2 cache. In a real step the small kernels' inputs come from the cache; here
they come from memory, so their rates are those of a cold cache.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dycoke_core.engine.backends.cuda.tiles import (
    SMALL_TILE,
    TileCapacity,
    TileRows,
    Tiles,
    TileShape,
    plan_tiles,
)
from dycoke_core.gpu_kernels import rows as layout
from dycoke_core.gpu_kernels.attention import merge_parts, split_attend
from dycoke_core.gpu_kernels.layers import add_rmsnorm, embed, rope_store, silu_mul
from dycoke_core.gpu_kernels.sampling import SamplingScratch, sample
from dycoke_core.gpu_kernels.scoring import visual_scores
from dycoke_core.gpu_kernels.selection import gate_select
from loadtest.geometry import Geometry

_LAYER = 0
_KEPT_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class KernelCase:
    """
    Args:
        num_bytes: each read and written once, including the lists of slots.
        from_memory: whether a real step, too, finds these inputs in memory, not in the cache.
    """

    name: str
    run: Callable[[], object]
    num_bytes: int
    from_memory: bool = False


@dataclass(frozen=True, slots=True)
class StepInputs:
    """
    Args:
        num_tokens: tokens that each row reads in a layer without stage II.
        num_visual: how many of them are visual, after TTM.
    """

    geometry: Geometry
    batch: int
    num_tokens: int
    num_visual: int
    dtype: torch.dtype
    device: torch.device
    seed: int = 0

    @property
    def head_size(self) -> int:
        return self.geometry.hidden_size // self.geometry.num_heads

    @property
    def scaling(self) -> float:
        return 1 / math.sqrt(self.head_size)

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def integers(self, values: npt.NDArray[Any] | list[int]) -> Tensor:
        return torch.as_tensor(np.asarray(values, np.int32)).to(self.device)

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)


def kernel_cases(inputs: StepInputs) -> Iterator[KernelCase]:
    yield from attention_cases(inputs)
    yield from stage_two_cases(inputs)
    yield from layer_cases(inputs)
    yield from sampling_cases(inputs)


# --- attention ---


def slot_lists(inputs: StepInputs) -> dict[str, npt.NDArray[np.int32]]:
    """By kind, [B, tokens]: slots of the same pool, different ones for each row."""
    generator = np.random.default_rng(inputs.seed)
    batch, length = inputs.batch, inputs.num_tokens
    ordered = np.arange(batch * length, dtype=np.int32).reshape(batch, length)
    num_kept = int(_KEPT_SHARE * inputs.num_visual)
    kept = [np.sort(generator.permutation(inputs.num_visual)[:num_kept]) for _ in range(batch)]
    return {
        "contiguous": ordered,
        "random": generator.permutation(batch * length).astype(np.int32).reshape(batch, length),
        "kept": ordered[np.arange(batch)[:, None], np.stack(kept)],
    }


def attention_cases(inputs: StepInputs) -> Iterator[KernelCase]:
    """split_attend on each kind of list, and merge_parts on the parts of the first."""
    heads, kv_heads, size = (
        inputs.geometry.num_heads,
        inputs.geometry.num_kv_heads,
        inputs.head_size,
    )
    num_rows = inputs.batch * inputs.num_tokens
    keys, values = (inputs.numbers(num_rows, kv_heads, size) for _ in "kv")
    query = inputs.numbers(inputs.batch, heads, size)
    for name, slots in slot_lists(inputs).items():
        tiles, shape = _tiles(inputs, slots.shape[1])
        parts, log_total = (
            inputs.floats(len(tiles.items), kv_heads, shape.tile_rows, *tail)
            for tail in ((size,), ())
        )
        attend = _attend(inputs, query, keys, values, slots, tiles, parts, log_total)
        part_bytes = len(tiles.parts) * heads * (size + 1) * 4
        row_bytes = 2 * kv_heads * size * keys.itemsize
        yield KernelCase(
            f"split_attend_{name}",
            attend,
            slots.size * (row_bytes + 4 * kv_heads) + query.nbytes + part_bytes,
            from_memory=True,
        )
        if name == "contiguous":
            attend()
            merge = _merge(inputs, tiles, parts, log_total)
            yield KernelCase("merge_parts", merge, part_bytes + query.nbytes)


def _attend(
    inputs: StepInputs,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: npt.NDArray[np.int32],
    tiles: Tiles,
    parts: Tensor,
    log_total: Tensor,
) -> Callable[[], None]:
    flat, items = inputs.integers(slots.reshape(-1)), inputs.integers(tiles.items)
    num_items = inputs.integers([len(tiles.items)])
    return lambda: split_attend(
        *(query, keys, values, flat, items, num_items, parts, log_total),
        layer=_LAYER,
        list_layer=_LAYER,
        scaling=inputs.scaling,
        tile_rows=SMALL_TILE,
    )


def _merge(
    inputs: StepInputs, tiles: Tiles, parts: Tensor, log_total: Tensor
) -> Callable[[], None]:
    heads = inputs.geometry.num_heads
    output = torch.empty(
        (inputs.batch, heads, inputs.head_size), dtype=inputs.dtype, device=inputs.device
    )
    total, table = inputs.floats(inputs.batch, heads), inputs.integers(_rows(inputs))
    of_rows, first = inputs.integers(tiles.parts), inputs.integers(tiles.first)
    return lambda: merge_parts(
        *(parts, log_total, of_rows, first, table, output, total),
        list_layer=_LAYER,
        tile_rows=SMALL_TILE,
    )


def _tiles(inputs: StepInputs, length: int) -> tuple[Tiles, TileShape]:
    """Tiles as a step would cut unshared lists of this length."""
    geometry, batch = inputs.geometry, inputs.batch
    group = geometry.num_heads // geometry.num_kv_heads
    shape = TileShape(SMALL_TILE, group, geometry.num_kv_heads, geometry.num_layers)
    first = np.arange(batch, dtype=np.int64) * length
    nothing = np.zeros(batch, np.int64)
    rows = TileRows(
        prefix_first=first,
        prefix_length=np.full(batch, length, np.int64),
        first_pruned=np.full(batch, geometry.num_layers, np.int64),
        seat_first=first,
        num_front=nothing,
        num_own=nothing,
    )
    return plan_tiles(rows, shape, TileCapacity.for_batch(batch, length, shape)), shape


def _rows(inputs: StepInputs) -> npt.NDArray[np.int32]:
    """ROWS of a batch that scores in `_LAYER`, seats from 1 on, lists one after the other."""
    table = np.zeros((inputs.batch, layout.ROW_COLUMNS), np.int32)
    index = np.arange(inputs.batch)
    table[:, layout.SEAT] = index + 1
    table[:, layout.TOKEN_ID] = layout.LAST_TOKEN
    table[:, layout.WRITE_SLOT] = index * inputs.num_tokens
    table[:, layout.FIRST_PRUNED] = _LAYER + 1
    table[:, layout.SCORING_LAYER] = _LAYER
    table[:, layout.NUM_VISUAL] = inputs.num_visual
    table[:, layout.NUM_KEPT] = int(_KEPT_SHARE * inputs.num_visual)
    table[:, layout.VISUAL_FIRST] = index * inputs.num_tokens
    table[:, layout.KEPT_FIRST] = inputs.batch * inputs.num_tokens + index * inputs.num_visual
    table[:, layout.CHOICE] = layout.HIGHEST
    table[:, layout.FLAGS] = layout.FIRST_STEP  # selects at every call
    return table


# --- stage II ---


def stage_two_cases(inputs: StepInputs) -> Iterator[KernelCase]:
    geometry, batch, num_visual = inputs.geometry, inputs.batch, inputs.num_visual
    keys = inputs.numbers(batch * inputs.num_tokens, geometry.num_kv_heads, inputs.head_size)
    query = inputs.numbers(batch, geometry.num_heads, inputs.head_size)
    total = torch.full((batch, geometry.num_heads), 12.0, device=inputs.device)
    scores = inputs.floats(batch, num_visual).uniform_()
    table = inputs.integers(_rows(inputs))
    slots = inputs.integers(np.arange(batch * (inputs.num_tokens + num_visual)))
    yield KernelCase(
        "visual_scores",
        lambda: visual_scores(
            *(query, keys, slots, table, total, scores), layer=_LAYER, scaling=inputs.scaling
        ),
        batch * num_visual * (geometry.num_kv_heads * inputs.head_size * keys.itemsize + 8),
        from_memory=True,
    )
    reference = inputs.floats(batch + 1, num_visual).uniform_()
    kept, refreshes, changed, given = (
        torch.zeros(shape, dtype=torch.int32, device=inputs.device)
        for shape in ((batch + 1, num_visual), (batch + 1,), (batch,), (1,))
    )
    drawn = inputs.floats(batch, num_visual).uniform_()

    moved = batch * num_visual * (4 + 4 + 4) + int(_KEPT_SHARE * num_visual) * batch * 12
    state = (drawn, reference, kept, slots, given, refreshes, changed)
    yield KernelCase("gate_select", lambda: gate_select(table, *state, layer=_LAYER), moved)


# --- layers and sampling ---


def layer_cases(inputs: StepInputs) -> Iterator[KernelCase]:
    geometry, batch = inputs.geometry, inputs.batch
    hidden, inner, size = geometry.hidden_size, geometry.intermediate_size, inputs.head_size
    x, residual, weight = (
        inputs.numbers(*shape) for shape in ((batch, hidden),) * 2 + ((hidden,),)
    )
    yield KernelCase("add_rmsnorm", lambda: add_rmsnorm(x, residual, weight, 1e-6), 4 * x.nbytes)
    width = (geometry.num_heads + 2 * geometry.num_kv_heads) * size
    qkv, cosines, sines = (inputs.numbers(batch, n) for n in (width, size, size))
    pools = [inputs.numbers(batch * layout.PAGE, geometry.num_kv_heads, size) for _ in "kv"]
    write_slots = inputs.integers(np.arange(batch) * layout.PAGE)
    stored = 2 * batch * geometry.num_kv_heads * size * qkv.itemsize
    yield KernelCase(
        "rope_store",
        lambda: rope_store(
            *(qkv, cosines, sines, write_slots, *pools), layer=0, num_heads=geometry.num_heads
        ),
        2 * qkv.nbytes + 2 * cosines.nbytes + stored,
    )
    gate_up = inputs.numbers(batch, 2 * inner)
    yield KernelCase("silu_mul", lambda: silu_mul(gate_up), gate_up.nbytes * 3 // 2)
    table = inputs.integers(_rows(inputs))
    last_ids = inputs.integers(np.arange(batch + 1))
    embeddings = inputs.numbers(geometry.vocab_size, hidden)
    yield KernelCase("embed", lambda: embed(table, last_ids, embeddings), 2 * x.nbytes)


def sampling_cases(inputs: StepInputs) -> Iterator[KernelCase]:
    """Greedy, and drawn from a nucleus; the bytes are one pass over the logits."""
    batch, vocabulary, device = inputs.batch, inputs.geometry.vocab_size, inputs.device
    logits = 3 * inputs.numbers(batch, vocabulary)
    table = inputs.integers(_rows(inputs))
    scratch = SamplingScratch.allocate(batch, vocabulary, device)
    last_ids, ids, is_finite = (
        torch.zeros(count, dtype=torch.int32, device=device) for count in (batch + 1, batch, batch)
    )
    uniform = torch.rand(batch, dtype=torch.float64, device=device)
    for name, temperature in (("greedy", 0.0), ("drawn", 0.7)):
        settings = torch.full((batch,), temperature, device=device)
        top_p = torch.full((batch,), 0.9, device=device)

        def run(settings: Tensor = settings, top_p: Tensor = top_p) -> None:
            sample(*(logits, settings, top_p, uniform, table, last_ids, ids, is_finite, scratch))

        yield KernelCase(f"sample_{name}", run, logits.nbytes)
