"""What tokens see, against loops over every pair."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dycoke_core.engine.sight import chunk_end, end_seen, first_seen, window_of
from dycoke_core.errors import ModelLoadError
from dycoke_core.model.adapter import LayerKind, LayerSpec

RUNS = [range(3, 6), range(6, 9), range(12, 13)]


def layer(window: int | None) -> LayerSpec:
    kind = LayerKind.FULL if window is None else LayerKind.SLIDING
    return LayerSpec(kind, 2, 16, window=window)


def test_a_model_has_one_window_or_none() -> None:
    assert window_of([layer(None), layer(None)]) is None
    assert window_of([layer(8), layer(None), layer(8)]) == 8
    with pytest.raises(ModelLoadError, match="different sizes"):
        window_of([layer(8), layer(16)])


@given(
    gaps=st.lists(st.integers(1, 5), min_size=1, max_size=20),
    window=st.none() | st.integers(1, 12),
)
def test_a_window_reaches_back_by_positions(gaps: list[int], window: int | None) -> None:
    positions = np.cumsum(gaps)
    for query, first in zip(positions, first_seen(positions, positions, window), strict=True):
        seen = [n for n, at in enumerate(positions) if window is None or query - at < window]
        assert first == seen[0]


@given(start=st.integers(0, 14), size=st.integers(1, 14))
def test_a_token_sees_up_to_itself_or_to_the_end_of_its_run(start: int, size: int) -> None:
    for token, end in zip(range(start, start + size), end_seen(start, size, RUNS), strict=True):
        run = next((run for run in RUNS if token in run), None)
        assert end == (token + 1 if run is None else run.stop)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 3, 3),  # between a text and a run
        (0, 5, 3),  # inside a run that may wait for the next chunk
        (3, 5, 6),  # inside a run that has to go whole, however long
        (3, 7, 6),
        (4, 6, 6),
        (0, 100, 100),
    ],
)
def test_a_chunk_parts_no_run(start: int, end: int, expected: int) -> None:
    assert chunk_end(start, end, RUNS) == expected
