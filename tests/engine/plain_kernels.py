"""The GPU's kernels in plain PyTorch: what the CUDA backend is tested with where there is no GPU.

In Triton's interpreter a decode step of one sequence takes half a second, and a conformance suite
wants tens of thousands of them. The kernels have tests of their own (`tests.gpu_kernels`), and
`tests.engine.test_interpreted` runs the backend on them; everything else about the backend (pages,
slot lists, tiles, uploads, roll-back, the step in flight) is the same on these.

They are stricter than the kernels: what a contract leaves undefined becomes NaN, a freshly
allocated page is NaN, and every index is checked.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dycoke_core.compression.kv_pruning import (
    choose_highest,
    choose_lowest,
    scores_agree,
)
from dycoke_core.engine import sampler
from dycoke_core.engine.backends.cuda import decode, prompts
from dycoke_core.engine.backends.cuda.pool import Extent, KVPool
from dycoke_core.gpu_kernels import layers
from dycoke_core.gpu_kernels import rows as columns
from dycoke_core.gpu_kernels.rows import PAGE
from tests.model.plain_kernels import PlainKernels

NAN = float("nan")


def install(monkeypatch: pytest.MonkeyPatch) -> list[AssertionError]:
    """Replaces the kernels by these until the test ends.

    Returns:
        What was wrong with kernels' arguments so far: the engine survives any error.
    """
    violations: list[AssertionError] = []
    for module in (decode, prompts):
        for kernel in KERNELS:
            if hasattr(module, kernel.__name__):
                monkeypatch.setattr(module, kernel.__name__, _watched(kernel, violations))
    plain = PlainKernels()
    for name in (
        *("add_rmsnorm", "head_rmsnorm", "norm_add_rmsnorm", "rope_store", "silu_mul", "gelu_mul"),
    ):
        monkeypatch.setattr(layers, name, getattr(plain, name))
    monkeypatch.setattr(KVPool, "allocate", _poisoned(KVPool.allocate))
    return violations


def _watched(kernel: Callable[..., Any], violations: list[AssertionError]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        try:
            return kernel(*arguments, **named)
        except AssertionError as error:
            violations.append(error)
            raise

    return run


def _poisoned(allocate: Callable[..., Extent | None]) -> Callable[..., Extent | None]:
    def allocate_poisoned(pool: KVPool, *arguments: Any) -> Extent | None:
        extent = allocate(pool, *arguments)
        for row in extent.page_rows if extent is not None else ():
            pool.keys[row : row + extent.rows_per_page] = NAN
            pool.values[row : row + extent.rows_per_page] = NAN
        return extent

    return allocate_poisoned


def split_attend(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    items: Tensor,
    num_items: Tensor,
    out: Tensor,
    log_total: Tensor,
    *,
    layer: int,
    list_layer: int,
    scaling: float,
    tile_rows: int,
) -> None:
    out.fill_(NAN)
    log_total.fill_(NAN)
    num_kv_heads, head_size = k_pool.shape[1:]
    group = q.shape[1] // num_kv_heads
    assert 0 <= num_items[0] <= len(items)
    for index, item in enumerate(items[: num_items[0]].tolist()):
        first_row, num_rows, first_slot, num_slots, first_layer, end_layer, causal, _ = item
        if not first_layer <= list_layer < end_layer:
            continue
        assert 0 < num_rows <= tile_rows // group and first_row + num_rows <= len(q)
        places = _places(slots, first_slot, num_slots, layer, k_pool)
        keys, values = k_pool[places].transpose(0, 1), v_pool[places].transpose(0, 1)  # [G, S, E]
        queries = q[first_row : first_row + num_rows].view(num_rows, num_kv_heads, group, head_size)
        packed = queries.transpose(0, 1).reshape(num_kv_heads, -1, head_size)  # [G, n * R, E]
        logits = packed @ keys.transpose(1, 2) * scaling
        row = torch.arange(num_rows).repeat_interleave(group)
        sees = torch.arange(num_slots) < causal + row[:, None]
        logits = logits.masked_fill(~sees, -torch.inf)
        weights = logits.softmax(dim=-1).masked_fill(~sees, 0.0)
        out[index, :, : num_rows * group] = weights @ values
        log_total[index, :, : num_rows * group] = logits.logsumexp(dim=-1)


def merge_parts(
    out: Tensor,
    log_total: Tensor,
    parts: Tensor,
    first: Tensor,
    rows: Tensor,
    o: Tensor,
    total: Tensor,
    *,
    list_layer: int,
    tile_rows: int,
) -> None:
    _num_rows, num_heads, head_size = o.shape
    num_kv_heads = out.shape[1]
    group = num_heads // num_kv_heads
    sides = (list_layer >= rows[:, columns.FIRST_PRUNED]).long()
    bounds = first.tolist()
    for row, side in enumerate(sides.tolist()):
        mine = parts[bounds[side][row] : bounds[side][row + 1]].long()
        if not len(mine):
            o[row], total[row] = 0.0, -torch.inf
            continue
        heads = (mine % tile_rows)[:, None] + torch.arange(group)  # [parts, R]
        assert int(heads.max()) < tile_rows
        items = (mine // tile_rows)[:, None]
        totals = log_total.transpose(1, 2)[items, heads]  # [parts, R, G]
        outputs = out.transpose(1, 2)[items, heads]  # [parts, R, G, E]
        joint = totals.logsumexp(dim=0)
        share = (totals - joint).exp()[..., None]
        merged = (share * outputs).sum(dim=0)  # [R, G, E]
        o[row] = merged.transpose(0, 1).reshape(num_heads, head_size).to(o.dtype)
        total[row] = joint.T.flatten()


def visual_scores(
    q: Tensor,
    k_pool: Tensor,
    slots: Tensor,
    rows: Tensor,
    total: Tensor,
    scores: Tensor,
    *,
    layer: int,
    scaling: float,
) -> None:
    num_kv_heads = k_pool.shape[1]
    for index, row in enumerate(rows.tolist()):
        if row[columns.SCORING_LAYER] != layer:
            continue
        num_visual = row[columns.NUM_VISUAL]
        places = _places(slots, row[columns.VISUAL_FIRST], num_visual, layer, k_pool)
        keys = k_pool[places].permute(1, 2, 0)  # [G, E, V]
        query = q[index].view(num_kv_heads, -1, q.shape[2])  # [G, R, E]
        logits = query @ keys * scaling - total[index].view(num_kv_heads, -1, 1)
        scores[index] = NAN
        scores[index, :num_visual] = logits.exp().mean(dim=(0, 1))


def gate_select(
    rows: Tensor,
    scores: Tensor,
    reference: Tensor,
    kept: Tensor,
    slots: Tensor,
    given: Tensor,
    refreshes: Tensor,
    changed: Tensor,
    *,
    layer: int,
) -> None:
    for index, row in enumerate(rows.tolist()):
        if row[columns.SCORING_LAYER] == columns.NO_LAYER:
            changed[index] = 0
        if row[columns.SCORING_LAYER] != layer:
            continue
        seat, flags = row[columns.SEAT], row[columns.FLAGS]
        num_visual, num_kept = row[columns.NUM_VISUAL], row[columns.NUM_KEPT]
        assert seat > 0 and 0 <= num_kept <= num_visual <= scores.shape[1]
        mine, before = scores[index, :num_visual], reference[seat, :num_visual]
        threshold = float(rows[index, columns.THRESHOLD].view(torch.float32))
        is_first = bool(flags & columns.FIRST_STEP)
        selects = is_first or not (flags & columns.ONE_SHOT or _agree(mine, before, threshold))
        changed[index] = int(selects)
        if not selects:
            continue
        reference[seat] = NAN
        reference[seat, :num_visual] = mine
        kept[seat] = -1
        kept[seat, :num_kept] = _choose(row, mine, given)
        if not flags & columns.KEPT_IN_OWN_ROWS:
            first, visual = row[columns.KEPT_FIRST], slots[row[columns.VISUAL_FIRST] :]
            slots[first : first + num_kept] = visual[kept[seat, :num_kept].long()]
        if not is_first:
            refreshes[seat] += 1


def gather_kept(
    host_k: Tensor,
    host_v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    rows: Tensor,
    kept: Tensor,
    changed: Tensor,
    host_slots: Tensor,
    slots: Tensor,
    *,
    layer: int,
) -> None:
    for index, row in enumerate(rows.tolist()):
        owns_rows = row[columns.FLAGS] & columns.KEPT_IN_OWN_ROWS
        if not owns_rows or layer < row[columns.FIRST_PRUNED] or not changed[index]:
            continue
        num_kept = row[columns.NUM_KEPT]
        mine = kept[row[columns.SEAT], :num_kept].long()
        assert len(mine) == num_kept and (mine >= 0).all()
        sources = host_slots[row[columns.HOST_FIRST] + mine].long() + layer * PAGE
        assert not num_kept or 0 <= int(sources.min()) <= int(sources.max()) < len(host_k)
        targets = _places(slots, row[columns.KEPT_FIRST], num_kept, layer, k_pool)
        k_pool[targets], v_pool[targets] = host_k[sources], host_v[sources]


def embed(rows: Tensor, last_ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    ids, seats = rows[:, columns.TOKEN_ID].long(), rows[:, columns.SEAT].long()
    return table[torch.where(ids < 0, last_ids[seats].long(), ids)] * scale


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    uniform: Tensor,
    rows: Tensor,
    last_ids: Tensor,
    ids: Tensor,
    is_finite: Tensor,
    scratch: object,
) -> None:
    settings = zip(temperature.tolist(), top_p.tolist(), uniform.tolist(), strict=True)
    sampled = sampler.sample(logits, [sampler.Draw(*numbers) for numbers in settings])
    seats = rows[:, columns.SEAT].long()
    is_row = seats > 0
    ids.copy_(sampled.ids.where(is_row, 0))
    is_finite.copy_(sampled.is_finite & is_row)
    last_ids[seats[is_row]] = ids[is_row]


KERNELS: tuple[Callable[..., Any], ...] = (
    *(split_attend, merge_parts, visual_scores),
    *(gate_select, gather_kept, embed, sample),
)


def _places(slots: Tensor, first: int, count: int, layer: int, pool: Tensor) -> Tensor:
    """Rows of the pool, int64 [count]; each is used once and lies in the pool."""
    places = slots[first : first + count].long() + layer * PAGE
    assert len(places) == count
    if count:
        assert 0 <= int(places.min()) <= int(places.max()) < len(pool)
        assert len(places.unique()) == count, "a token is attended to once"
    return places


def _agree(scores: Tensor, reference: Tensor, threshold: float) -> bool:
    return bool(scores_agree(scores, reference, threshold))


def _choose(row: list[int], scores: Tensor, given: Tensor) -> Tensor:
    num_kept = row[columns.NUM_KEPT]
    if row[columns.CHOICE] == columns.GIVEN:
        places = given[row[columns.GIVEN_FIRST] :][:num_kept]
        assert len(places) == num_kept
        return places
    choose = choose_lowest if row[columns.CHOICE] == columns.LOWEST else choose_highest
    return choose(scores, num_kept, 0)
