"""`python -m dycoke_core`: an answer without server or Redis."""

import subprocess
import sys
from pathlib import Path

from dycoke_core.tiny import CLIP


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "dycoke_core", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_it_streams_an_answer_and_says_what_it_cost() -> None:
    finished = run(CLIP, "Describe the video.", "--max-tokens", "12", "--num-frames", "8")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("There are ")
    assert "8 read with decord" in finished.stderr
    assert "392 tokens, 182 after stage I" in finished.stderr


def test_compression_is_chosen_by_name_or_object() -> None:
    by_name = run(CLIP, "What moves?", "--max-tokens", "4", "--compression", "full")
    by_object = run(
        CLIP, "What moves?", "--max-tokens", "4", "--compression", '{"policy": "dycoke", "k": 0.5}'
    )
    assert "1568 tokens, 1568 after stage I" in by_name.stderr
    assert "1568 tokens, 968 after stage I" in by_object.stderr


def test_errors_have_their_code_and_no_traceback(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    for arguments, code in (
        ((text, "What?"), "unsupported_container"),
        ((tmp_path / "missing.mp4", "What?"), "invalid_request"),
        ((CLIP, "What?", "--compression", "none"), "invalid_request"),
        ((CLIP, "What?", "--compression", "{"), "invalid_request"),
        ((CLIP, "What?", "--model", tmp_path), "model_load_failed"),
    ):
        finished = run(*arguments)
        assert finished.returncode == 1
        assert finished.stderr.startswith(f"error: {code}: ")
        assert "Traceback" not in finished.stderr
