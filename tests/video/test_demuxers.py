"""Which demuxer decord's own FFmpeg would choose, asked in a process that has loaded it."""

import json
import subprocess
import sys
from pathlib import Path

from dycoke_core.video.demuxers import DemuxerGuess
from tests.video_clips import make_clip

PROGRAM = """
import json, sys
if sys.argv[1] == "decord":
    import decord
from dycoke_core.video.demuxers import DemuxerGuess
guess = DemuxerGuess.of_loaded_library()
print(json.dumps([guess.names(path) for path in sys.argv[2:]]))
"""


def names_of(*paths: Path, library: str = "decord") -> list[list[str]]:
    command = [sys.executable, "-c", PROGRAM, library, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = json.loads(done.stdout)
    return found


def test_a_container_is_told_by_its_content_and_not_by_its_name(tmp_path: Path) -> None:
    films = [make_clip(tmp_path / name) for name in ("clip.mp4", "clip.mkv", "clip.ts")]
    disguised = tmp_path / "film.mp4"
    disguised.write_bytes(films[1].read_bytes())
    mp4, mkv, ts, hidden = names_of(*films, disguised)
    assert "mp4" in mp4 and "matroska" in mkv and ts == ["mpegts"]
    assert hidden == mkv


def test_what_is_no_video_or_not_there_has_no_demuxer(tmp_path: Path) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(range(256)) * 64)
    found, missing = names_of(noise, tmp_path / "none.mp4")
    assert found == missing == []


def test_without_a_loaded_library_nobody_knows(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4")
    assert names_of(clip, library="none") == [[]]
    assert DemuxerGuess(None).names(str(clip)) == ()
