import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dycoke_core.video.sampling import frames_in_clip, sample_indices


@given(total=st.integers(1, 100_000), num_frames=st.integers(1, 256))
def test_indices_are_those_of_llava(total: int, num_frames: int) -> None:
    indices = sample_indices(range(total), num_frames)
    assert list(indices) == np.linspace(0, total - 1, num_frames, dtype=int).tolist()


@given(start=st.integers(0, 1000), length=st.integers(1, 5000), num_frames=st.integers(1, 256))
def test_indices_rise_through_the_whole_clip(start: int, length: int, num_frames: int) -> None:
    indices = sample_indices(range(start, start + length), num_frames)
    assert len(indices) == num_frames
    assert indices[0] == start
    assert list(indices) == sorted(indices)
    if num_frames > 1:
        assert indices[-1] == start + length - 1
    if 1 < num_frames <= length:
        assert len(set(indices)) == num_frames
        gaps = np.diff(indices)
        assert gaps.max() - gaps.min() <= 1


def test_frames_of_a_shorter_clip_are_repeated() -> None:
    assert sample_indices(range(3), 7) == (0, 0, 0, 1, 1, 1, 2)


_TIMES = [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize(
    ("start_s", "end_s", "clip"),
    [
        (None, None, range(4)),
        (0.5, None, range(1, 4)),
        (0.7, None, range(1, 4)),  # frame 1 is on screen at 0.7 s
        (None, 1.0, range(2)),  # frame 2 begins at 1.0 s
        (0.6, 0.7, range(1, 2)),
        (1.9, 9.0, range(3, 4)),
        (2.0, None, range(0)),
    ],
)
def test_a_clip_runs_from_the_frame_on_screen_to_the_last_before_its_end(
    start_s: float | None, end_s: float | None, clip: range
) -> None:
    assert frames_in_clip(_TIMES, 2.0, start_s, end_s) == clip
