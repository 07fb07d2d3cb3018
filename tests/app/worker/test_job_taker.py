"""What a worker makes of a job for its engine."""

import numpy as np

from app.worker.job_taker import timing_of
from dycoke_core.video import VideoFrames


def frames_at(*timestamps_s: float) -> VideoFrames:
    count = len(timestamps_s)
    pixels = np.zeros((count, 2, 2, 3), np.uint8)
    return VideoFrames(pixels, tuple(range(count)), timestamps_s, "decord", ())


def test_the_engine_learns_when_frames_are_shown() -> None:
    assert timing_of(frames_at(0.0, 0.5, 2.0)).timestamps_s == (0.0, 0.5, 2.0)


def test_times_that_do_not_ascend_are_held() -> None:
    assert timing_of(frames_at(-0.1, 0.5, 0.2, 3.0)).timestamps_s == (0.0, 0.5, 0.5, 3.0)
