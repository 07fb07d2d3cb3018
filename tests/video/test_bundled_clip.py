from pathlib import Path

import numpy as np

from dycoke_core.tiny.render_clip import CLIP, FPS, SECONDS, write_clip
from dycoke_core.video import FrameSpec, VideoFrames, read_video_frames


def _read(path: Path) -> VideoFrames:
    return read_video_frames(path, FrameSpec(num_frames=32, image_size=112))


def test_the_bundled_clip_is_small_and_readable_without_a_warning() -> None:
    assert CLIP.stat().st_size < 300_000
    frames = _read(CLIP)
    assert (frames.reader, frames.warnings) == ("decord", ())
    assert frames.indices[-1] == FPS * SECONDS - 1


def test_something_happens_in_it() -> None:
    pixels = _read(CLIP).pixels.astype(int)
    changes = abs(np.diff(pixels, axis=0)).mean(axis=(1, 2, 3))
    assert (changes > 0.5).all()  # no two frames are alike
    assert pixels[0].mean() > 2 * pixels[-1].mean()  # night has fallen


def test_its_script_renders_it_again(tmp_path: Path) -> None:
    write_clip(tmp_path / "again.mp4")
    bundled, again = _read(CLIP), _read(tmp_path / "again.mp4")
    assert abs(bundled.pixels.astype(int) - again.pixels.astype(int)).mean() < 1
