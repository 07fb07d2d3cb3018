"""Memory that a child fills and cannot take away."""

import os

import numpy as np
import pytest

from dycoke_core.video.frame_buffer import map_for_writing, map_pixels, open_frame_buffer

SHAPE = (2, 3, 4, 3)


def test_what_the_child_wrote_is_what_the_parent_reads() -> None:
    with open_frame_buffer(SHAPE) as fd:
        assert not map_pixels(fd, SHAPE).any()  # zeros where nothing was written
        pixels = np.arange(72, dtype=np.uint8).reshape(SHAPE)
        map_for_writing(fd, SHAPE)[:] = pixels
        seen = map_pixels(fd, SHAPE)
    np.testing.assert_array_equal(seen, pixels)  # the mapping outlives the descriptor


def test_what_the_parent_writes_is_its_own() -> None:
    with open_frame_buffer(SHAPE) as fd:
        mine = map_pixels(fd, SHAPE)
        mine[:] = 7
        assert not map_pixels(fd, SHAPE).any()


@pytest.mark.parametrize("num_bytes", [0, 71, 73])
def test_the_size_is_sealed(num_bytes: int) -> None:
    with open_frame_buffer(SHAPE) as fd:
        with pytest.raises(PermissionError):
            os.ftruncate(fd, num_bytes)
        assert os.fstat(fd).st_size == 72
