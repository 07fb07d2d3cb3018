"""The supervisor with real processes: restarts, order, force, no orphans."""

import asyncio
import errno
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.supervisor import (
    EXIT_BAD_SETTINGS,
    LIFE_VARIABLE,
    ChildSpec,
    RestartPolicy,
    Supervisor,
    this_life,
)
from tests.integration.workers import PATIENCE_S, ROOT, is_alive, wait_until

pytestmark = pytest.mark.flaky(reruns=1)  # on a machine that stalls, as tests/integration
FAST = RestartPolicy(first_wait_s=0.02, max_wait_s=0.08)

# Says in a file that it runs and when it is told to stop.
CHILD = """
import os, signal, sys, time
log = open(sys.argv[1], "a", buffering=1)
def stop(*_):
    log.write(f"stop {sys.argv[2]}\\n")
    sys.exit(0)
def hesitate(*_):
    signal.signal(signal.SIGTERM, stop)
    log.write(f"asked {sys.argv[2]}\\n")
on_signal = {"stubborn": signal.SIG_IGN, "patient": hesitate}.get(sys.argv[2], stop)
signal.signal(signal.SIGTERM, on_signal)
log.write(f"start {sys.argv[2]} {os.getpid()}\\n")
while True:
    time.sleep(600)
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "children.log"
    path.touch()
    return path


def child(log: Path, name: str, **options: object) -> ChildSpec:
    argv = (sys.executable, "-c", CHILD, str(log), name)
    return ChildSpec(name, argv, **options)  # type: ignore[arg-type]


def command(code: str, name: str = "child", **options: object) -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-c", code), **options)  # type: ignore[arg-type]


async def wait_for_lines(log: Path, start: str, count: int) -> list[str]:
    def found() -> list[str]:
        return [line for line in log.read_text().splitlines() if line.startswith(start)]

    async def are_there() -> bool:
        return len(found()) >= count

    await wait_until(are_there)
    return found()


@asynccontextmanager
async def running(*specs: ChildSpec) -> AsyncIterator["asyncio.Task[int]"]:
    """Ended by SIGTERM, as in life."""
    supervisor = asyncio.create_task(Supervisor(specs, restarts=FAST).run())
    await asyncio.sleep(0)
    yield supervisor
    if not supervisor.done():
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            assert await supervisor == 0


async def test_dead_child_is_logged_and_started_again(
    log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(child(log, "a")):
        for deaths in range(3):
            last = (await wait_for_lines(log, "start a", deaths + 1))[-1]
            os.kill(int(last.split()[-1]), signal.SIGKILL)
        await wait_for_lines(log, "start a", 4)
    died = [record for record in caplog.records if "died" in record.message]
    assert [record.__dict__["exit_code"] for record in died] == [-9, -9, -9]
    assert [record.__dict__["restart_in_s"] for record in died] == [0.02, 0.04, 0.08]
    assert all(record.levelno == logging.ERROR for record in died)


async def test_each_end_is_told_with_the_life_that_ended(log: Path) -> None:
    told: list[tuple[str, int]] = []

    async def on_end(life: str, exit_code: int) -> None:
        told.append((life, exit_code))
        raise RuntimeError("which ends nothing")

    code = (
        "import pathlib, sys; sys.path.insert(0, '.'); from app.supervisor import this_life\n"
        f"pathlib.Path({str(log)!r}).open('a').write(this_life() + '\\n')\n"
        "raise SystemExit(7)"
    )

    async def died_often() -> bool:
        return len(told) >= 3

    async with running(command(code, on_end=on_end)):
        await wait_until(died_often)
    lives = log.read_text().split()
    assert told[:3] == [(life, 7) for life in lives[:3]]
    assert len(set(lives)) == len(lives)


async def test_a_child_that_the_supervisor_kills_itself_is_no_news(log: Path) -> None:
    told: list[int] = []

    async def on_end(life: str, exit_code: int) -> None:
        told.append(exit_code)

    async with running(child(log, "stubborn", stop_timeout_s=0.1, on_end=on_end)):
        await wait_for_lines(log, "start", 1)
    assert told == []


def test_a_process_without_a_supervisor_has_a_life_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert this_life() != this_life()
    monkeypatch.setenv(LIFE_VARIABLE, f"{os.getppid()}:abc")
    assert this_life() == "abc"
    # Inherited from another supervisor.
    monkeypatch.setenv(LIFE_VARIABLE, f"{os.getpid()}:abc")
    assert this_life() != "abc"


async def test_child_that_could_not_be_started_is_tried_again(
    log: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn = asyncio.create_subprocess_exec
    refusals = [errno.ENOMEM, errno.EAGAIN]

    async def reluctant(*args: Any, **options: Any) -> asyncio.subprocess.Process:
        if refusals:
            raise OSError(refusals.pop(), "no room")
        return await spawn(*args, **options)

    monkeypatch.setattr("app.supervisor.asyncio.create_subprocess_exec", reluctant)
    async with running(child(log, "a")):
        await wait_for_lines(log, "start a", 1)
    failed = [r for r in caplog.records if r.message == "child could not be started"]
    assert [record.__dict__["errno"] for record in failed] == [errno.EAGAIN, errno.ENOMEM]
    died = [record for record in caplog.records if "died" in record.message]
    assert [record.__dict__["exit_code"] for record in died] == [1, 1]
    assert [record.__dict__["restart_in_s"] for record in died] == [0.02, 0.04]


async def test_child_that_lives_long_enough_is_restarted_without_delay(
    log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calm = RestartPolicy(first_wait_s=0.01, max_wait_s=60, stable_after_s=0.0)
    specs = [command("raise SystemExit(3)")]
    supervisor = asyncio.create_task(Supervisor(specs, restarts=calm).run())

    def waits() -> list[float]:
        return [r.__dict__["restart_in_s"] for r in caplog.records if "died" in r.message]

    async def died_often() -> bool:
        return len(waits()) >= 4

    await wait_until(died_often)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await supervisor == 0
    assert set(waits()) == {0.01}


async def test_children_stop_in_their_order(log: Path) -> None:
    specs = (
        child(log, "redis", stop_order=2),
        child(log, "worker", stop_order=1),
        child(log, "api", stop_order=0),
    )
    async with running(*specs):
        await wait_for_lines(log, "start", 3)
    assert await wait_for_lines(log, "stop", 3) == ["stop api", "stop worker", "stop redis"]


async def test_child_that_ignores_the_request_is_killed(
    log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(child(log, "stubborn", stop_timeout_s=0.1), child(log, "a", stop_order=1)):
        await wait_for_lines(log, "start", 2)
    assert "child did not stop in time" in caplog.messages
    assert await wait_for_lines(log, "stop", 1) == ["stop a"]


async def test_second_signal_kills_at_once(log: Path) -> None:
    async with running(child(log, "stubborn", stop_timeout_s=10 * PATIENCE_S)) as supervisor:
        await wait_for_lines(log, "start", 1)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        assert not supervisor.done()
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            assert await supervisor == 0


async def test_second_signal_is_passed_on_to_a_child_that_hurries_then(
    log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long_s = 10 * PATIENCE_S
    specs = (
        child(log, "patient", stop_timeout_s=long_s, hurry_timeout_s=long_s),
        child(log, "redis", stop_order=1, hurry_timeout_s=long_s),
        child(log, "stubborn", stop_order=1, stop_timeout_s=long_s),
    )
    async with running(*specs) as supervisor:
        await wait_for_lines(log, "start", 3)
        os.kill(os.getpid(), signal.SIGTERM)
        await wait_for_lines(log, "asked patient", 1)
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            assert await supervisor == 0
    assert await wait_for_lines(log, "stop", 2) == ["stop patient", "stop redis"]
    assert "child did not stop in time" not in caplog.messages


async def test_third_signal_kills_what_hurries_too_slowly(log: Path) -> None:
    long_s = 10 * PATIENCE_S
    spec = child(log, "stubborn", stop_timeout_s=long_s, hurry_timeout_s=long_s)
    async with running(spec) as supervisor:
        await wait_for_lines(log, "start", 1)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.1)
        assert not supervisor.done()
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            assert await supervisor == 0


async def test_owner_of_a_child_hears_of_its_deaths_and_of_the_stop(log: Path) -> None:
    heard: list[str] = []
    spec = child(log, "a", on_death=lambda: heard.append("death"))
    supervisor = Supervisor([spec], restarts=FAST, on_stop=lambda: heard.append("stop"))
    run = asyncio.create_task(supervisor.run())
    for deaths in range(2):
        last = (await wait_for_lines(log, "start a", deaths + 1))[-1]
        os.kill(int(last.split()[-1]), signal.SIGKILL)
    await wait_for_lines(log, "start a", 3)
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(PATIENCE_S):
        assert await run == 0
    assert heard == ["death", "death", "stop"], "one that was told to stop has not died"


async def test_child_does_not_get_what_is_kept_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYCOKE_API_KEYS", "a:secret")
    monkeypatch.setenv("DYCOKE_LOG_LEVEL", "ERROR")
    path = tmp_path / "environ"
    code = f"import pathlib, os; pathlib.Path({str(path)!r}).write_text(repr(dict(os.environ)))"
    async with running(command(code, drop_env=("DYCOKE_API_KEYS",), env={"ADDED": "1"})):
        environ = await written(path)
    assert "secret" not in environ and "DYCOKE_LOG_LEVEL" in environ and "ADDED" in environ


async def written(path: Path) -> str:
    async def is_there() -> bool:
        return path.exists() and path.read_text().endswith("}")

    await wait_until(is_there)
    return path.read_text()


async def test_child_that_refuses_its_settings_ends_everything(log: Path) -> None:
    async with running(
        child(log, "a"), command(f"raise SystemExit({EXIT_BAD_SETTINGS})")
    ) as supervisor:
        async with asyncio.timeout(PATIENCE_S):
            assert await supervisor == EXIT_BAD_SETTINGS


async def test_child_that_has_run_before_is_restarted_whatever_its_exit_code(log: Path) -> None:
    code = (
        "import pathlib, sys; log = pathlib.Path(sys.argv[1]); n = len(log.read_text())\n"
        f"log.write_text('\\n' * (n + 1)); sys.exit({EXIT_BAD_SETTINGS} if n else 1)"
    )
    argv = (sys.executable, "-c", code, str(log))

    async def ran_often() -> bool:
        return len(log.read_text()) >= 4

    async with running(ChildSpec("child", argv)):
        await wait_until(ran_often)


async def test_killed_supervisor_leaves_no_orphans(log: Path) -> None:
    argv = [sys.executable, "-m", "tests.integration.supervise"]
    for name in ("a", "stubborn"):
        argv.append(f"{name}={shlex.join(child(log, name).argv)}")
    supervisor = subprocess.Popen(argv, cwd=ROOT)
    pids = [int(line.split()[-1]) for line in await wait_for_lines(log, "start", 2)]
    assert all(psutil.Process(pid).ppid() == supervisor.pid for pid in pids)
    supervisor.kill()
    await asyncio.to_thread(supervisor.wait, PATIENCE_S)

    async def are_gone() -> bool:
        return not any(is_alive(pid) for pid in pids)

    await wait_until(are_gone)


def test_child_whose_parent_is_gone_already_does_not_run() -> None:
    program = str(ROOT / "app" / "dies_with_parent.py")
    result = subprocess.run(
        [sys.executable, "-I", "-S", program, "1", "9", sys.executable, "-c", "print('ran')"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert result.returncode != 0
    assert result.stdout == ""
