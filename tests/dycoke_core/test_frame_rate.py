"""Frames that a rate makes, against the numbers that transformers' processors take."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dycoke_core.frame_rate import RateRule

QWEN = RateRule(min_frames=4, max_frames=768, multiple=2)


@pytest.mark.parametrize(
    ("wanted", "given_frames", "most", "taken"),
    [
        (20.0, 250, 1000, 20),
        (21.9, 250, 1000, 20),  # down to a whole unit
        (1.0, 250, 1000, 4),  # never fewer than a clip needs
        (1.0, 3, 1000, 2),  # unless it has fewer
        (1.0, 1, 1000, 1),  # a clip of one frame has one
        (5000.0, 10**6, 10**6, 768),
        (100.0, 250, 64, 64),
        (100.0, math.inf, 63, 62),
        (0.0, math.inf, 1000, 4),
    ],
)
def test_a_rate_makes_whole_units_within_every_bound(
    wanted: float, given_frames: float, most: float, taken: int
) -> None:
    assert QWEN.count(wanted, given=given_frames, most=most) == taken


@given(
    wanted=st.floats(0, 1e6),
    given_frames=st.integers(1, 10**6),
    most=st.integers(1, 1024),
    multiple=st.integers(1, 4),
)
def test_there_is_always_a_frame_and_never_one_too_many(
    wanted: float, given_frames: int, most: int, multiple: int
) -> None:
    rule = RateRule(min_frames=4, max_frames=768, multiple=multiple)
    taken = rule.count(wanted, given=given_frames, most=most)
    assert 1 <= taken <= max(min(given_frames, most, 768), 1)
    assert taken == 1 or taken % multiple == 0
