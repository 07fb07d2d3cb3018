"""Kept sets as they are stored: against plain loops over every bit."""

import numpy as np
import pytest

from dycoke_core import kept_sets
from dycoke_core.kept_sets import KeptHistory, KeptRecorder, KeptSetDroppedError

UNITS, ROWS, COLUMNS = 3, 2, 5


def bits(bitset: bytes) -> list[int]:
    """Places of the bits that are set, the most significant of a byte first."""
    return [
        8 * byte + bit
        for byte, value in enumerate(bitset)
        for bit in range(8)
        if value & (0x80 >> bit)
    ]


def answer(seed: int, *, is_sorted: bool = True) -> tuple[list[int], list[list[int]]]:
    """What stage I kept, and places among it that stage II kept at tokens 1, 2, ..."""
    random = np.random.default_rng(seed)
    kept = random.permutation(UNITS * ROWS * COLUMNS)[:17]
    kept = np.sort(kept) if is_sorted else kept
    steps = [sorted(random.permutation(17)[:5].tolist()) for _ in range(6)]
    return kept.tolist(), [steps[index] for index in (0, 0, 1, 2, 2, 2, 3, 4, 4, 5)]


def record(kept: list[int], steps: list[list[int]]) -> KeptHistory:
    recorder = KeptRecorder(UNITS, ROWS, COLUMNS, np.array(kept, np.int64))
    for token, places in enumerate(steps, start=1):
        recorder.add(token, np.array(places, np.int32))
    return recorder.history(len(steps) + 1)


@pytest.mark.parametrize("is_sorted", [True, False], ids=["raster order", "another order"])
@pytest.mark.parametrize("seed", range(4))
def test_every_tokens_set_comes_back(seed: int, is_sorted: bool) -> None:
    kept, steps = answer(seed, is_sorted=is_sorted)
    history = KeptHistory.decode(record(kept, steps).encode())
    assert (history.units, history.tokens_per_unit) == (UNITS, ROWS * COLUMNS)
    assert bits(history.stage_one) == sorted(kept) and len(history.stage_one) == 4
    for token, places in enumerate(steps, start=1):
        stage_two = history.stage_two(token)
        assert stage_two is not None and len(stage_two) == 4
        assert bits(stage_two) == sorted(kept[place] for place in places)
    assert history.last == history.stage_two(len(steps))
    assert not history.is_truncated


def test_sets_are_stored_where_they_change() -> None:
    assert [token for token, _ in record(*answer(0)).changes] == [1, 3, 4, 7, 8, 10]


def test_the_prompts_token_has_no_second_stage() -> None:
    history = record(*answer(0))
    assert history.stage_two(0) is None
    for token in (-1, history.num_tokens):
        with pytest.raises(IndexError):
            history.stage_two(token)


def test_without_stage_two_there_is_stage_one_alone() -> None:
    history = KeptRecorder(UNITS, ROWS, COLUMNS, np.arange(30)).history(5)
    assert KeptHistory.decode(history.encode()) == history
    assert bits(history.stage_one) == list(range(30))
    assert [history.stage_two(token) for token in range(5)] == [None] * 5


def test_nothing_kept_is_a_set_too() -> None:
    history = record([], [[], []])
    assert bits(history.stage_one) == [] and history.stage_two(1) == b"\0\0\0\0"
    history = record([1, 2], [[], [0]])
    assert history.stage_two(1) == b"\0\0\0\0" and bits(history.last or b"") == [1]


def test_a_full_history_keeps_the_first_tokens_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = 4 + 512 + 2 * 4 + 80
    monkeypatch.setattr(kept_sets, "MAX_HISTORY_BYTES", limit)
    kept, steps = answer(1)
    history = KeptHistory.decode(record(kept, steps).encode())
    assert history.is_truncated and 1 < history.num_stored < history.num_tokens == 11
    assert len(history.encode()) <= limit
    for token in range(1, history.num_stored):
        assert bits(history.stage_two(token) or b"") == sorted(kept[p] for p in steps[token - 1])
    with pytest.raises(KeptSetDroppedError):
        history.stage_two(history.num_stored)
    # What the receipt says of the last step is still right.
    assert bits(history.last or b"") == sorted(kept[place] for place in steps[-1])


def test_the_longest_answer_that_changes_at_every_step_stays_within_the_limit() -> None:
    random = np.random.default_rng(0)
    kept = np.arange(0, 128 * 196, 2)
    recorder = KeptRecorder(128, 14, 14, kept)
    for token in range(1, 500):
        recorder.add(token, random.permutation(len(kept))[:3000])
    history = recorder.history(500)
    assert history.is_truncated
    assert kept_sets.MAX_HISTORY_BYTES / 2 < len(history.encode()) <= kept_sets.MAX_HISTORY_BYTES
