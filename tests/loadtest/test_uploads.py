"""The benchmark of uploads: what it sends, and its ratios."""

from pathlib import Path

import pytest

from dycoke_core.video import FrameReaders, ReadLimits
from loadtest.uploads import row_of, write_video


async def test_video_is_one_that_readers_take_and_new_each_time(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    write_video(path, 2)
    first = path.read_bytes()
    write_video(path, 2)
    assert len(first) == path.stat().st_size >= 2_000_000
    assert first != path.read_bytes()
    readers = FrameReaders(ReadLimits(), max_readers=1, allow_unsandboxed=True)
    try:
        assert (await readers.probe(path)).codec == "h264"
    finally:
        await readers.aclose()


def test_ratios_are_those_of_paired_turns() -> None:
    rates = {
        "cp": [100.0, 200.0, 400.0],
        "sha256sum": [50.0, 50.0, 100.0],
        "x": [100.0, 100.0, 100.0],
    }
    row = row_of("x", rates["x"], rates, [3.0, 1.0, 2.0])
    assert (row["mb_s"], row["of_cp"], row["of_sha256sum"]) == (100.0, 0.5, pytest.approx(2.0))
    assert row["cpu_s_per_gb"] == 2.0
    assert row_of("cp", rates["cp"], rates, None)["cpu_s_per_gb"] is None
