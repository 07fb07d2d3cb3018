"""The one place where kernels are launched, so that launches can be counted."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Told a kernel's name at each launch; a graph's replay launches nothing here, its capture does.
Observer = Callable[[str], None]

_observers: list[Observer] = []


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches a kernel on the current device and tells the observers. Waits for nothing.

    Multiplications and additions are not fused, so that results round as PyTorch's operations do.

    Args:
        kernel: a function under `triton.jit`.
        grid: number of programs in one to three dimensions; nothing runs where one of them is 0.
        args, options: the kernel's arguments, its constants, `num_warps` and `num_stages`.
    """
    if 0 in grid:
        return
    kernel[grid](*args, enable_fp_fusion=False, **options)
    for observer in tuple(_observers):
        observer(kernel.__name__)


@contextmanager
def observing_launches(observer: Observer) -> Iterator[None]:
    """Calls the observer with each kernel's name until the block ends; for every thread."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def counting_launches() -> Iterator[Counter[str]]:
    """How often each kernel is launched inside the block, by name."""
    counts: Counter[str] = Counter()

    def count(name: str) -> None:
        counts[name] += 1

    with observing_launches(count):
        yield counts
