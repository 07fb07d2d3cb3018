"""What somebody else's code tries once it runs inside a frame reader."""

from pathlib import Path

import pytest

from dycoke_core.video.fork_client import ForkServer
from dycoke_core.video.forked_child import TaskFailure
from tests.security.tally import Tally
from tests.video.conftest import CONFINEMENT

ROW = "probes inside the sandbox: files, sockets, processes, memory, threads, replies"
PATIENCE_S = 60.0
MAX_DESCRIPTORS = 2  # the video, and the pipe for the reply
# What ends it, by what it does.
ENDS = {
    "eat_memory": "memory",
    "die_of_memory": "memory",
    "spin": "cpu",
    "spin_natively": "cpu",
    "ask_for_threads_for_ever": "cpu",
    "overwrite_code": "crash",
    "babble": "crash",
    "invent_an_error": "exception",
}


async def test_nothing_is_possible_that_must_not_be(
    hostile: ForkServer, video_fd: int, tmp_path: Path, tally: Tally
) -> None:
    other = tmp_path / "other"
    other.write_text("secret")
    params = {"other_path": str(other)}
    report = await hostile.run("try_everything", params, video_fd, timeout_s=PATIENCE_S)
    for name in report["tried"]:
        tally.count(ROW, name if name in report["possible"] else None)
    opened = await hostile.run("list_descriptors", {}, video_fd, timeout_s=PATIENCE_S)
    tally.count(ROW, None if len(opened["open"]) <= MAX_DESCRIPTORS else f"descriptors: {opened}")
    threads = await hostile.run("start_as_many_threads_as_it_may", {}, video_fd, timeout_s=20)
    is_bounded = threads["num_threads"] <= CONFINEMENT.max_threads
    tally.count(ROW, None if is_bounded else f"threads: {threads}")
    assert other.read_text() == "secret"
    assert {path.name for path in tmp_path.iterdir()} == {"other", "video"}
    tally.check(ROW)


@pytest.mark.parametrize("task", ENDS)
async def test_a_child_that_goes_too_far_is_ended_and_the_next_is_well(
    hostile: ForkServer, video_fd: int, task: str, tally: Tally
) -> None:
    with pytest.raises(TaskFailure) as failure:
        await hostile.run(task, {}, video_fd, timeout_s=PATIENCE_S)
    tally.count(ROW, None if failure.value.code == ENDS[task] else f"{task}: {failure.value.code}")
    assert await hostile.run("echo", {"x": 1}, video_fd, timeout_s=PATIENCE_S) == {"x": 1}
    tally.check(ROW)
