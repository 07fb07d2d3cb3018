"""What a file is recognised as before a child gets it."""

import os
from pathlib import Path

import pytest

from dycoke_core.errors import UnreadableVideoError, UnsupportedContainerError
from dycoke_core.video.containers import Container
from dycoke_core.video.video_file import open_video
from tests.video_clips import make_clip


async def test_a_video_is_open_for_as_long_as_the_block_lasts(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4")
    async with open_video(path) as video:
        assert video.container is Container.MP4
        path.unlink()  # a child reads the file that was looked at, whatever its name is now
        assert os.fstat(video.fd).st_size > 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(video.fd)


async def test_what_is_no_video_is_refused_and_leaves_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("What happens in the video?" * 20)
    os.mkfifo(tmp_path / "pipe")  # opening it for reading would wait for a writer
    (tmp_path / "folder").mkdir()
    refusals = {
        "missing": (UnreadableVideoError, "cannot be opened"),
        "folder": (UnreadableVideoError, "not a regular file"),
        "pipe": (UnreadableVideoError, "not a regular file"),
        "empty": (UnreadableVideoError, "empty"),
        "text": (UnsupportedContainerError, "not in a container we take"),
    }
    for name, (error, words) in refusals.items():
        with pytest.raises(error, match=words):
            async with open_video(tmp_path / name):
                pass
    left = {os.readlink(f"/proc/self/fd/{fd}") for fd in _open_descriptors()}
    assert not {path for path in left if path.startswith(str(tmp_path))}


def _open_descriptors() -> list[str]:
    """Without the one that the listing itself had open."""
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
