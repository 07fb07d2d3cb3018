"""Launches all kernels in one place, so that launches can be counted, and checks arguments."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dycoke_core.gpu_kernels.rows import ROW_COLUMNS

# Called with a kernel's name at each launch; capturing a graph launches, replaying it does not.
Observer = Callable[[str], None]

_observers: list[Observer] = []


@dataclass(frozen=True, slots=True)
class Launch:
    """A recorded launch: what the kernel would have been launched with."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]  # the kernel's constants and the compiler's options


_records: list[list[Launch]] = []


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches a kernel on the current device and notifies the observers. Waits for nothing.

    Multiplications and additions are not fused, so that results round like PyTorch's operations.

    Args:
        kernel: a function under `triton.jit`.
        grid: number of programs in one to three dimensions; nothing runs if one of them is 0.
        args, options: the kernel's arguments, its constants, `num_warps` and `num_stages`.
    """
    if 0 in grid:
        return
    options["enable_fp_fusion"] = False
    if _records:
        _records[-1].append(Launch(kernel, grid, args, options))
        return
    kernel[grid](*args, **options)
    for observer in tuple(_observers):
        observer(kernel.__name__)


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition on an argument holds."""
    if not condition:
        raise ValueError(message)


def check_rows(rows: Tensor, num_rows: int) -> None:
    """Raises ValueError unless `rows` is a table of `num_rows` rows."""
    require(rows.shape == (num_rows, ROW_COLUMNS), f"rows must be [B, {ROW_COLUMNS}]")
    check_tensors(torch.int32, rows=rows)


def check_tensors(dtype: torch.dtype, **tensors: Tensor) -> None:
    """Raises ValueError unless each tensor is contiguous and of the dtype."""
    for name, tensor in tensors.items():
        require(tensor.dtype == dtype, f"{name} must be {dtype}, not {tensor.dtype}")
        require(tensor.is_contiguous(), f"{name} must be contiguous")


@contextmanager
def observing_launches(observer: Observer) -> Iterator[None]:
    """Calls the observer at every thread's launches until the block ends."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def counting_launches() -> Iterator[Counter[str]]:
    """Counts the launches of each kernel inside the block, by name."""
    counts: Counter[str] = Counter()

    def count(name: str) -> None:
        counts[name] += 1

    with observing_launches(count):
        yield counts


@contextmanager
def recording_launches() -> Iterator[list[Launch]]:
    """Records kernels inside the block instead of running them, to compile them ahead.

    The tensors need no data (`device="meta"`).
    """
    record: list[Launch] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records.pop()
