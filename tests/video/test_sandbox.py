"""The sandbox, tried from inside a real child."""

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dycoke_core.errors import SandboxUnavailableError
from dycoke_core.video import FrameReaders, FrameSpec, ReadLimits, SandboxState
from dycoke_core.video.fork_client import ForkServer
from dycoke_core.video.forked_child import TaskFailure
from dycoke_core.video.landlock import landlock_abi
from dycoke_core.video.sandbox import has_random_layout
from tests.video.conftest import CONFINEMENT, leaving_nothing_behind
from tests.video_clips import make_clip

_NOTHING_REFUSED = {
    "refuses_files": False,
    "refuses_sockets": False,
    "refuses_processes": False,
    "refuses_threads": False,
}


async def test_a_child_can_do_none_of_what_it_must_not(
    hostile: ForkServer, video_fd: int, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_text("secret")
    params = {"other_path": str(other)}
    report = await hostile.run("try_everything", params, video_fd, timeout_s=20)
    assert report["tried"] and report["possible"] == []
    assert other.read_text() == "secret"


async def test_a_child_can_read_its_video_and_start_threads(
    hostile: ForkServer, video_fd: int
) -> None:
    read = await hostile.run("read_the_video", {}, video_fd, timeout_s=20)
    assert read == {"content": "moving pictures"}
    assert await hostile.run("start_threads", {}, video_fd, timeout_s=20) == {"num_threads": 4}


async def test_a_child_has_no_more_threads_than_it_may(hostile: ForkServer, video_fd: int) -> None:
    for num_threads in (1, 4):
        report = await hostile.run(
            "start_as_many_threads_as_it_may",
            {},
            video_fd,
            timeout_s=20,
            num_threads=num_threads,
        )
        limit = CONFINEMENT.with_threads(num_threads).max_threads
        assert report == {"num_threads": limit}


async def test_a_child_that_asks_for_ever_delays_no_other(
    hostile: ForkServer, video_fd: int
) -> None:
    asking = asyncio.create_task(
        hostile.run("ask_for_threads_for_ever", {}, video_fd, timeout_s=3600)
    )
    for _ in range(5):
        threads = await hostile.run("start_threads", {}, video_fd, timeout_s=60)
        assert threads == {"num_threads": 4}
    with pytest.raises(TaskFailure, match="cpu"):
        await asking


async def test_a_child_holds_its_video_and_its_reply_pipe_and_nothing_else(
    hostile: ForkServer, video_fd: int
) -> None:
    report = await hostile.run("list_descriptors", {}, video_fd, timeout_s=20)
    assert len(report["open"]) == 2


def test_random_addresses_are_told_from_fixed_ones() -> None:
    """`setarch -R` starts a program without them."""
    program = "from dycoke_core.video.sandbox import has_random_layout as f; print(f())"
    command = [sys.executable, "-c", program]
    kernel = Path("/proc/sys/kernel/randomize_va_space").read_text().strip()
    said = subprocess.check_output(command, text=True).strip()
    assert said == str(kernel == "2" and has_random_layout())
    if not (setarch := shutil.which("setarch")):
        return
    fixed = subprocess.run([setarch, "-R", *command], capture_output=True, text=True)
    if fixed.returncode == 0:  # some container runtimes forbid it
        assert fixed.stdout.strip() == "False"


async def test_the_state_is_observed_and_said_in_one_line(readers: FrameReaders) -> None:
    assert readers.sandbox == SandboxState(landlock_abi(), True, True, True, True)
    assert readers.sandbox.describe() == (
        f"frame readers are sandboxed: Landlock ABI {landlock_abi()}, seccomp allow-list, "
        "thread limit, rlimits"
    )


def test_a_system_that_cannot_confine_readers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ForkServer, "observe_refusals", lambda self: _NOTHING_REFUSED)
    with leaving_nothing_behind(), pytest.raises(SandboxUnavailableError, match="NO Landlock"):
        FrameReaders(ReadLimits(), max_readers=1)


async def test_such_a_system_is_taken_where_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ForkServer, "observe_refusals", lambda self: _NOTHING_REFUSED)
    readers = FrameReaders(ReadLimits(), max_readers=1, allow_unsandboxed=True)
    assert readers.sandbox.describe().startswith("frame readers are NOT fully sandboxed")
    frames = await readers.read(make_clip(tmp_path / "clip.mp4"), FrameSpec(4, 112))
    assert frames.indices == (0, 19, 39, 59)
    await readers.aclose()


def test_readers_that_cannot_start_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with leaving_nothing_behind(), pytest.raises(SandboxUnavailableError, match="started"):
        FrameReaders(ReadLimits(), max_readers=1, allow_unsandboxed=True)
