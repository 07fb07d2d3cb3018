"""Children that misbehave, and how their parent takes it."""

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from dycoke_core.video import fork_client
from dycoke_core.video.fork_client import ForkServer
from dycoke_core.video.forked_child import TaskFailure
from dycoke_core.video.frame_buffer import map_pixels, open_frame_buffer
from tests.video.conftest import CONFINEMENT, descendants, leaving_nothing_behind

PATIENCE_S = 120.0  # for what must happen, two seconds of CPU time among it, on a busy machine


async def _failure(
    server: ForkServer, name: str, fd: int, timeout_s: float = PATIENCE_S
) -> TaskFailure:
    with pytest.raises(TaskFailure) as caught:
        await server.run(name, {}, fd, timeout_s=timeout_s)
    return caught.value


async def _is_well(server: ForkServer, fd: int) -> bool:
    return bool(await server.run("echo", {"x": 1}, fd, timeout_s=PATIENCE_S) == {"x": 1})


async def _has_child(server_pid: int, *, is_wanted: bool) -> bool:
    """Waits until the server has a child, or has none."""
    server = psutil.Process(server_pid)
    async with asyncio.timeout(PATIENCE_S):
        while bool(server.children()) is not is_wanted:
            await asyncio.sleep(0.01)
    return True


async def test_a_task_returns_its_result_and_reports_progress(
    hostile: ForkServer, video_fd: int
) -> None:
    shares: list[float] = []
    result = await hostile.run(
        "echo", {"x": [1, 2]}, video_fd, timeout_s=PATIENCE_S, on_progress=shares.append
    )
    assert result == {"x": [1, 2]}
    assert shares == [0.25, 0.75]


async def test_a_child_writes_pixels_for_its_parent(hostile: ForkServer, video_fd: int) -> None:
    shape = (2, 8, 8, 3)
    with open_frame_buffer(shape) as fd:
        await hostile.run(
            "write_pixels", {"value": 7}, video_fd, timeout_s=PATIENCE_S, pixels=(fd, shape)
        )
        pixels = map_pixels(fd, shape)
    assert pixels.shape == shape
    assert (pixels == 7).all()
    pixels[0] = 9  # the array is the caller's own, and outlives the buffer


@pytest.mark.parametrize(
    ("task", "code"),
    [
        ("eat_memory", "memory"),
        ("die_of_memory", "memory"),
        ("spin", "cpu"),
        ("spin_natively", "cpu"),
        ("exit_silently", "exception"),
        ("fail", "exception"),
        ("invent_an_error", "exception"),
        ("report_unreadable", "unreadable"),
        ("no_such_task", "exception"),
    ],
)
async def test_a_lost_child_is_reported_by_its_reason_and_the_next_works(
    hostile: ForkServer, video_fd: int, task: str, code: str
) -> None:
    assert await _is_well(hostile, video_fd)
    with leaving_nothing_behind():
        failure = await _failure(hostile, task, video_fd)
        assert failure.code == code
        assert await _is_well(hostile, video_fd)


@pytest.mark.parametrize("task", ["crash", "overwrite_code", "babble"])
async def test_after_a_crash_no_child_has_the_same_addresses(
    hostile: ForkServer, video_fd: int, task: str
) -> None:
    assert await _is_well(hostile, video_fd)
    [server] = descendants()
    reading = asyncio.create_task(
        hostile.run("echo_later", {"x": 2}, video_fd, timeout_s=PATIENCE_S)
    )
    assert await _has_child(server.pid, is_wanted=True)
    assert (await _failure(hostile, task, video_fd)).code == "crash"
    assert await reading == {"x": 2}, "it is left to its end"
    assert await _is_well(hostile, video_fd)
    [another] = descendants()
    assert another != server


async def test_addresses_do_not_last_for_ever_without_a_crash(
    hostile: ForkServer, video_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_client, "MAX_TASKS", 2)
    servers = []
    for _ in range(5):
        reading = asyncio.create_task(
            hostile.run("echo_later", {"x": 2}, video_fd, timeout_s=PATIENCE_S)
        )
        while not (found := descendants()):
            await asyncio.sleep(0.01)
        servers.append(found[0].pid)
        assert await reading == {"x": 2}
    assert servers[0] == servers[1] != servers[2] == servers[3] != servers[4]


@pytest.mark.parametrize("task", ["sleep", "spin"])
async def test_a_child_that_takes_too_long_is_killed(
    hostile: ForkServer, video_fd: int, task: str
) -> None:
    assert await _is_well(hostile, video_fd)
    with leaving_nothing_behind():
        assert (await _failure(hostile, task, video_fd, timeout_s=0.3)).code == "timeout"
        assert await _is_well(hostile, video_fd)


async def test_cancelling_kills_the_child_at_once(hostile: ForkServer, video_fd: int) -> None:
    assert await _is_well(hostile, video_fd)
    [server] = descendants()
    with leaving_nothing_behind():
        reading = asyncio.create_task(hostile.run("sleep", {}, video_fd, timeout_s=3600))
        assert await _has_child(server.pid, is_wanted=True)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await _has_child(server.pid, is_wanted=False)


async def test_many_children_run_side_by_side(hostile: ForkServer, video_fd: int) -> None:
    runs = [hostile.run("echo", {"x": x}, video_fd, timeout_s=PATIENCE_S) for x in range(20)]
    results = await asyncio.gather(*runs, _failure(hostile, "crash", video_fd))
    assert results[:20] == [{"x": x} for x in range(20)]


async def test_a_dead_server_fails_its_children_and_is_started_again(
    hostile: ForkServer, video_fd: int
) -> None:
    assert await _is_well(hostile, video_fd)
    [server] = descendants()
    reading = asyncio.create_task(_failure(hostile, "sleep", video_fd, timeout_s=3600))
    assert await _has_child(server.pid, is_wanted=True)
    [child] = server.children()
    server.kill()
    assert (await reading).code == "killed"
    assert psutil.wait_procs([child], timeout=PATIENCE_S)[1] == []
    assert await _is_well(hostile, video_fd)


async def test_a_child_that_somebody_kills_is_said_to_be_killed(
    hostile: ForkServer, video_fd: int
) -> None:
    assert await _is_well(hostile, video_fd)
    [server] = descendants()
    reading = asyncio.create_task(_failure(hostile, "sleep", video_fd, timeout_s=3600))
    assert await _has_child(server.pid, is_wanted=True)
    server.children()[0].kill()
    assert (await reading).code == "killed"


async def test_a_child_that_cannot_be_forked_is_nobodys_fault(
    hostile: ForkServer, video_fd: int
) -> None:
    assert await _is_well(hostile, video_fd)
    [server] = descendants()
    before = server.rlimit(psutil.RLIMIT_AS)
    server.rlimit(psutil.RLIMIT_AS, (2**20, before[1]))  # a fork copies more
    server.rlimit(psutil.RLIMIT_NOFILE, (server.num_fds(), 64))  # nor is there room for a pidfd
    assert (await _failure(hostile, "echo", video_fd)).code == "no_process"
    server.rlimit(psutil.RLIMIT_AS, before)
    server.rlimit(psutil.RLIMIT_NOFILE, (64, 64))
    assert await _is_well(hostile, video_fd)
    assert descendants() == [server], "it was not started again"


async def test_a_server_that_cannot_be_started_is_nobodys_fault(
    hostile: ForkServer, video_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise BlockingIOError("no more processes")

    with monkeypatch.context() as patch:
        patch.setattr("dycoke_core.video.fork_client.subprocess.Popen", refuse)
        with leaving_nothing_behind():
            assert (await _failure(hostile, "echo", video_fd)).code == "no_process"
    assert await _is_well(hostile, video_fd)


async def test_signals_to_the_whole_service_leave_the_server_to_its_parent(
    hostile: ForkServer, video_fd: int
) -> None:
    assert await _is_well(hostile, video_fd)
    [server] = descendants()
    server.terminate()
    server.send_signal(signal.SIGINT)
    assert await _is_well(hostile, video_fd)
    assert descendants() == [server]


async def test_a_stopped_server_is_given_up_when_its_time_is_over(
    hostile: ForkServer, video_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dycoke_core.video.fork_client.KILL_PATIENCE_S", 0.2)
    assert await _is_well(hostile, video_fd)
    [server] = descendants()
    server.suspend()
    assert (await _failure(hostile, "echo", video_fd, timeout_s=0.2)).code == "timeout"
    assert not server.is_running()
    assert await _is_well(hostile, video_fd)


async def test_closing_ends_the_server_and_running_children(
    hostile: ForkServer, video_fd: int
) -> None:
    with leaving_nothing_behind():
        assert await _is_well(hostile, video_fd)
        [server] = descendants()
        reading = asyncio.create_task(_failure(hostile, "sleep", video_fd, timeout_s=3600))
        assert await _has_child(server.pid, is_wanted=True)
        await hostile.aclose()
        assert (await reading).code == "killed"


def test_nothing_outlives_a_killed_parent(tmp_path: Path) -> None:
    video = tmp_path / "video"
    video.write_text("x")
    program = f"""
import asyncio, os, psutil
from tests.video.conftest import CONFINEMENT
from dycoke_core.video.fork_client import ForkServer

async def main():
    server = ForkServer("tests.video.hostile_tasks", CONFINEMENT)
    fd = os.open({str(video)!r}, os.O_RDONLY)
    await server.run("echo", {{}}, fd, timeout_s=60)
    asyncio.create_task(server.run("sleep", {{}}, fd, timeout_s=3600))
    while len(psutil.Process().children(recursive=True)) < 2:
        await asyncio.sleep(0.01)
    print("ready", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        family = psutil.Process(parent.pid).children(recursive=True)
        assert len(family) == 2
        parent.send_signal(signal.SIGKILL)
    assert psutil.wait_procs(family, timeout=PATIENCE_S)[1] == []


def test_a_server_whose_client_died_says_nothing() -> None:
    """The kernel reports a client that left a message unread by a reset, not by an end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with (
        theirs,
        subprocess.Popen(
            [
                *(sys.executable, "-m", "dycoke_core.video.fork_server"),
                *(str(theirs.fileno()), "tests.video.hostile_tasks"),
            ],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        ) as server,
    ):
        read_end, write_end = os.pipe()
        confinement = asdict(CONFINEMENT)
        task = {"name": "echo", "params": {}, "num_threads": 1, "confinement": confinement}
        message = json.dumps({"run": 1, "task": task}).encode()
        with open(__file__, "rb") as video:
            socket.send_fds(ours, [message], [video.fileno(), write_end])
        os.close(write_end)
        while os.read(read_end, 65536):  # until the child's end
            pass
        os.close(read_end)
        theirs.close()
        assert select.select([ours], [], [], PATIENCE_S)[0]  # its end is reported, and left unread
        ours.close()
        assert server.wait(PATIENCE_S) == 0
        assert server.stderr is not None
        assert server.stderr.read() == b""


async def test_a_reply_that_comes_when_the_server_is_gone_is_taken_quietly(
    hostile: ForkServer, video_fd: int
) -> None:
    problems: list[dict[str, object]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: problems.append(context))
    for _ in range(5):
        reading = asyncio.create_task(_failure(hostile, "sleep", video_fd, timeout_s=3600))
        await asyncio.sleep(0.3)
        hostile.close()  # ends the child, whose pipe is closed before its reader is removed
        assert (await reading).code == "killed"
    assert problems == []


async def test_a_child_sees_no_secrets_and_keeps_to_its_limits(
    hostile: ForkServer, video_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYCOKE_API_KEYS", "secret")
    assert await _is_well(hostile, video_fd)
    [server] = descendants()
    reading = asyncio.create_task(_failure(hostile, "sleep", video_fd, timeout_s=3600))
    assert await _has_child(server.pid, is_wanted=True)
    [child] = server.children()
    async with asyncio.timeout(PATIENCE_S):
        while child.rlimit(psutil.RLIMIT_NOFILE)[1] != 16:  # it confines itself
            await asyncio.sleep(0.01)
    assert "secret" not in str(child.environ())
    assert child.rlimit(psutil.RLIMIT_AS)[1] == CONFINEMENT.memory_bytes
    assert child.rlimit(psutil.RLIMIT_CPU)[0] == CONFINEMENT.cpu_s
    assert child.rlimit(psutil.RLIMIT_FSIZE)[1] == 0
    assert child.rlimit(psutil.RLIMIT_CORE)[1] == 0
    await hostile.aclose()
    assert (await reading).code == "killed"


async def test_waiting_for_a_child_costs_the_parent_no_time(
    hostile: ForkServer, video_fd: int
) -> None:
    assert await _is_well(hostile, video_fd)
    before_s = time.process_time()
    await _failure(hostile, "sleep", video_fd, timeout_s=1.0)
    assert time.process_time() - before_s < 0.5
