"""Kept keys and values come from the host's pool into the seat's own rows."""

import pytest
import torch

from dycoke_core.gpu_kernels import rows as layout
from dycoke_core.gpu_kernels.host_copy import gather_kept
from tests.gpu_kernels.slot_lists import DEVICE, DTYPES, SlotPool, int32, table_row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_kv_heads", [2, 3])  # 3: a row that fills no power of two
def test_only_rows_whose_set_has_changed_are_copied_in_pruned_layers(
    num_kv_heads: int, dtype: torch.dtype
) -> None:
    device, host = (SlotPool(num_kv_heads, 16, dtype, seed=seed) for seed in (0, 1))
    if DEVICE == "cuda":
        host.keys, host.values = host.keys.cpu().pin_memory(), host.values.cpu().pin_memory()
    num_visual, num_kept, first_pruned = 90, 70, 2
    generator = torch.Generator().manual_seed(2)
    kept, rows, targets, sources = [[0] * 100], [], [], []
    for b, flags in enumerate([layout.KEPT_IN_OWN_ROWS] * 2 + [0]):
        targets.append(device.take(num_kept + 5))
        sources.append(host.take(num_visual, (first_pruned, 4)))
        order = torch.randperm(num_visual, generator=generator)[:num_kept].sort().values
        kept.append(order.tolist() + [-1] * (100 - num_kept))
        rows.append(
            table_row(
                seat=b + 1,
                first_pruned=first_pruned,
                num_visual=num_visual,
                num_kept=num_kept,
                kept_first=device.put(targets[b]),
                host_first=host.put(sources[b]),
                flags=flags,
            )
        )
    changed = int32([1, 0, 1])
    for layer in (1, 3):
        before = device.keys.clone(), device.values.clone()
        gather_kept(
            *(host.keys, host.values, device.keys, device.values),
            *(int32(rows), int32(kept), changed, host.slots(), device.slots()),
            layer=layer,
        )
        if layer >= first_pruned:
            chosen = [sources[0][place] + layer * layout.PAGE for place in kept[1][:num_kept]]
            written = [slot + layer * layout.PAGE for slot in targets[0][:num_kept]]
            before[0][written] = host.keys[chosen].to(DEVICE)
            before[1][written] = host.values[chosen].to(DEVICE)
        assert torch.equal(device.keys, before[0]) and torch.equal(device.values, before[1])
