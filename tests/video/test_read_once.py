from pathlib import Path

from dycoke_core.video import FrameSpec, read_video_frames
from tests.video.conftest import leaving_nothing_behind
from tests.video_clips import frame_numbers, make_clip


def test_a_program_without_an_event_loop_can_read(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4")
    with leaving_nothing_behind():
        frames = read_video_frames(path, FrameSpec(num_frames=8, image_size=112))
        assert frame_numbers(frames.pixels) == list(frames.indices)
        del frames
