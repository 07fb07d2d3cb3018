import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dycoke_core.video.sampling import frames_in_clip, sample_indices, shown_s
from tests.qwen_sampling import sample_qwen2_vl, sample_qwen3_vl


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
    assert sample_indices(range(3), 7, "nearest") == (0, 0, 1, 1, 1, 2, 2)
    assert sample_indices(range(3), 7, "starts") == (0, 0, 0, 1, 1, 2, 2)


@settings(deadline=None)
@given(total=st.integers(1, 100_000), num_frames=st.integers(1, 256))
def test_nearest_frames_are_those_of_qwen3_vl(total: int, num_frames: int) -> None:
    assert list(sample_indices(range(total), num_frames, "nearest")) == sample_qwen3_vl(
        total, num_frames
    )


@settings(deadline=None)
@given(num_units=st.integers(1, 128), extra=st.integers(0, 100_000))
@example(num_units=95, extra=99_999)
def test_starts_are_those_of_qwen2_vl(num_units: int, extra: int) -> None:
    """Of whole units, to which its processor rounds. It counts in float32, where a start that is a
    whole frame may come out as a little less, and one a little below it as the whole frame."""
    num_frames = 2 * num_units
    total = num_frames + extra
    ours = sample_indices(range(total), num_frames, "starts")
    theirs = sample_qwen2_vl(total, num_frames)[:num_frames]
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        start = number * total / num_frames
        is_whole = abs(start - round(start)) <= total * 2.0**-22
        assert mine == other or (is_whole and abs(mine - other) == 1)


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


@pytest.mark.parametrize(
    ("clip", "shown"), [(range(4), 2.0), (range(1, 3), 1.0), (range(3, 4), 0.5), (range(0), 0.0)]
)
def test_a_clip_is_shown_from_its_first_frame_to_where_its_last_one_ends(
    clip: range, shown: float
) -> None:
    assert shown_s(_TIMES, 2.0, clip) == shown


@given(total=st.integers(1, 5000), fps=st.sampled_from([24000 / 1001, 24.0, 30000 / 1001, 60.0]))
def test_of_rounded_times_it_is_frames_by_the_rate(total: int, fps: float) -> None:
    """Matroska has milliseconds."""
    times = [round(number / fps, 3) for number in range(total)]
    end_s = times[-1] + 1 / fps
    for clip in (range(total), range(total // 3, total)):
        assert shown_s(times, end_s, clip, fps=fps, tick_s=0.001) == len(clip) / fps


def test_a_rate_that_the_times_do_not_keep_says_nothing() -> None:
    for fps in (1.99, 24.0, None):
        assert shown_s(_TIMES, 2.0, range(4), fps=fps, tick_s=0.001) == 2.0
