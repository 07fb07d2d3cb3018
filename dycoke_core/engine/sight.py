"""Which tokens a token attends to, where that is not simply all before it: windows, and units whose
tokens attend to the whole unit.

A window is counted in positions, not in places: tokens that stage I dropped take room in it, so it
reaches as far back in the video as without compression. The positions of a prefix ascend, and so do
those of the question after it, so a token attends to a range of places. Knows no device.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dycoke_core.errors import ModelLoadError
from dycoke_core.model.adapter import LayerSpec

Integers = npt.NDArray[np.int64]


def window_of(layers: Sequence[LayerSpec]) -> int | None:
    """Of the layers that have one: tokens that a query sees, its own included. None: no layer has.

    Raises:
        ModelLoadError: layers have windows of different sizes.
    """
    windows = {spec.window for spec in layers} - {None}
    if len(windows) > 1:
        raise ModelLoadError("layers with windows of different sizes are not supported")
    return next(iter(windows), None)


def first_seen(positions: Integers, queries: Integers, window: int | None) -> Integers:
    """For each query, the first place that it attends to.

    Args:
        positions: ascending, of the places.
        queries: positions of the tokens that look.
        window: None: they attend to everything before them.
    """
    if window is None:
        return np.zeros(len(queries), np.int64)
    return np.searchsorted(positions, queries - window, side="right").astype(np.int64)


def end_seen(start: int, size: int, runs: Sequence[range]) -> Integers:
    """For each of a prefix's tokens from `start` on, the end of the places that it sees: its own,
    or that of its run, where it belongs to one.

    Args:
        runs: whose tokens see each other, ascending.
    """
    ends = np.arange(start + 1, start + size + 1)
    for run in runs:
        if run.start < start + size and run.stop > start:
            mine = slice(max(run.start - start, 0), run.stop - start)
            ends[mine] = run.stop
    return ends


def chunk_end(start: int, end: int, runs: Sequence[range]) -> int:
    """Where a prefix's chunk ends that is to end at `end` and may part no run: before the run, or
    after it where nothing else is left of the chunk."""
    for run in runs:
        if run.start < end < run.stop:
            return run.start if run.start > start else run.stop
    return end
