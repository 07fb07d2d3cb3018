"""Scenes as H.264 files: the same bytes from the same frames, and what they show."""

from pathlib import Path

import numpy as np

from dycoke_core.tiny.clip import FPS, clip_scene, write_video
from dycoke_core.tiny.render import render
from dycoke_core.tiny.scenes import SIZE, sample_scene
from dycoke_core.video import FrameSpec, read_video_frames


def test_the_same_frames_give_the_same_file(tmp_path: Path) -> None:
    frames = render(sample_scene(1, num_frames=8))
    files = [tmp_path / name for name in ("a.mp4", "b.mp4", "coarse.mp4")]
    for file, crf in zip(files, (20, 20, 40), strict=True):
        write_video(file, frames, crf=crf)
    first, second, coarse = (file.read_bytes() for file in files)
    assert first == second and len(coarse) < len(first)


def test_what_is_read_back_is_what_was_rendered(tmp_path: Path) -> None:
    frames = render(sample_scene(1, num_frames=8))
    write_video(tmp_path / "clip.mp4", frames)
    read = read_video_frames(tmp_path / "clip.mp4", FrameSpec(num_frames=8, image_size=SIZE))
    assert read.timestamps_s == tuple(number / FPS for number in range(8))
    assert abs(read.pixels.astype(int) - frames).mean() < 6


def test_the_bundled_clip_shows_a_flash_that_training_never_did() -> None:
    scene = clip_scene()
    assert scene.num_frames == 4 * FPS
    (flash,) = [thing for thing in scene.things if thing.flashes]
    assert (flash.color, flash.shape) == ("red", "triangle")
    assert np.array_equal(render(clip_scene()), render(scene))
