"""Launches are counted by name, and can be recorded instead."""

import pytest
import torch

from dycoke_core.gpu_kernels import columns, rows
from dycoke_core.gpu_kernels.launch import (
    counting_launches,
    observing_launches,
    recording_launches,
)
from dycoke_core.gpu_kernels.layers import silu_mul
from tests.gpu_kernels.slot_lists import DEVICE


def test_launches_are_counted_while_the_block_lasts() -> None:
    x = torch.ones(2, 8, device=DEVICE)
    silu_mul(x)
    with counting_launches() as outer:
        silu_mul(x)
        with counting_launches() as inner:
            silu_mul(x)
            silu_mul(x[:0])  # nothing to launch
    silu_mul(x)
    assert outer == {"silu_mul_kernel": 2} and inner == {"silu_mul_kernel": 1}


def test_an_observer_is_dropped_when_its_block_fails() -> None:
    names: list[str] = []
    with pytest.raises(RuntimeError), observing_launches(names.append):
        raise RuntimeError
    silu_mul(torch.ones(2, 8, device=DEVICE))
    assert names == []


def test_recorded_launches_do_not_run() -> None:
    x = torch.empty(2, 8, device="meta")
    with counting_launches() as counts, recording_launches() as launches:
        silu_mul(x)
    (launch,) = launches
    assert launch.kernel.__name__ == "silu_mul_kernel" and launch.args[0] is x
    assert launch.options["WIDTH"] == 4 and not counts


def test_the_kernels_read_the_tables_as_the_host_writes_them() -> None:
    constants = {name: value.value for name, value in vars(columns).items() if name.isupper()}
    assert constants == {name: getattr(rows, name) for name in constants}
    assert {"SEAT", "TOKEN_ID", "FIRST_PRUNED", "CAUSAL", "PAGE"} <= constants.keys()
