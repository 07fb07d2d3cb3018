"""What a sequence knows of its frames' content."""

import numpy as np

from dycoke_core.frame_content import distinct_units


def test_a_repeated_frame_is_one_that_equals_the_frame_before() -> None:
    frames = np.zeros((4, 2, 2, 3), np.uint8)
    frames[1] = 1
    assert distinct_units(frames) == ((0, 1, 2), (0, 1, 2, 2))
