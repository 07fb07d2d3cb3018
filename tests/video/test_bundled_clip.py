from pathlib import Path

import numpy as np

from dycoke_core.tiny import CLIP
from dycoke_core.tiny.clip import clip_scene, write_clip
from dycoke_core.tiny.render import render
from dycoke_core.tiny.scenes import SIZE
from dycoke_core.video import FrameSpec, VideoFrames, read_video_frames


def _read(path: Path) -> VideoFrames:
    return read_video_frames(path, FrameSpec(num_frames=32, image_size=SIZE))


def test_the_bundled_clip_is_small_and_readable_without_a_warning() -> None:
    assert CLIP.stat().st_size < 300_000
    frames = _read(CLIP)
    assert (frames.reader, frames.warnings) == ("decord", ())
    assert frames.indices == tuple(range(32))


def test_it_shows_its_scene() -> None:
    pixels = _read(CLIP).pixels.astype(int)
    changes = abs(np.diff(pixels, axis=0)).mean(axis=(1, 2, 3))
    assert (changes > 0).all()  # no two frames are alike
    assert abs(pixels - render(clip_scene())).mean() < 6  # what H.264 costs


def test_its_script_renders_it_again(tmp_path: Path) -> None:
    write_clip(tmp_path / "again.mp4")
    bundled, again = _read(CLIP), _read(tmp_path / "again.mp4")
    assert abs(bundled.pixels.astype(int) - again.pixels.astype(int)).mean() < 1
