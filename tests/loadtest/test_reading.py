"""The measurement of frame reading, at a size that takes a moment."""

from pathlib import Path

import pytest

from dycoke_core.video import FrameSpec, read_video_frames
from loadtest import reading
from loadtest.reading import CONTENDERS, Cost


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 320, "HEIGHT": 480, "FPS": 10, "UNIT_S": 1}.items():
        monkeypatch.setattr(reading, name, value)


def test_clips_are_as_long_as_they_are_called_and_repeat_their_unit(
    tmp_path: Path, small: None
) -> None:
    clips = reading.make_clips(tmp_path, [1, 3])
    frames = read_video_frames(clips[3], FrameSpec(num_frames=30, image_size=64))
    assert frames.indices == tuple(range(30))
    assert frames.timestamps_s == pytest.approx([number / 10 for number in range(30)], abs=0.001)
    assert (frames.reader, frames.warnings) == ("decord", ())
    assert (frames.pixels[:10] == frames.pixels[20:]).all()
    assert (frames.pixels[0] != frames.pixels[5]).any()


def test_whole_frames_are_read_as_well(tmp_path: Path, small: None) -> None:
    cost = reading.in_a_process("whole", reading.make_clips(tmp_path, [1])[1], num_cores=1)
    assert cost.cpu_s > 0


def test_ratios_are_of_the_same_turn() -> None:
    seen = {name: [Cost(1.0, 2.0), Cost(4.0, 2.0), Cost(10.0, 2.0)] for name in CONTENDERS}
    seen["reader"] = [Cost(0.5, 1.0), Cost(8.0, 1.0), Cost(5.0, 1.0)]
    row = reading.row_of(10, 2, "reader", seen)
    assert (row["wall_s"], row["wall_ratio"], row["cpu_ratio"]) == (5.0, 0.5, 0.5)
    assert "reader" in reading.table([row])
