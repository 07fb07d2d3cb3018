"""A command that ends with the process that started it, however that ends."""

import os
import signal
import subprocess
import sys
import time

import psutil

from app import dies_with_parent
from tests.integration.workers import is_alive

PATIENCE_S = 30.0
ISOLATED = (sys.executable, "-I", "-S")
# Starts a command that never ends by itself, says its number, and waits.
PARENT = """
import os, subprocess, sys, time
script, number, *command = sys.argv[1:]
words = [sys.executable, "-I", "-S", script, str(os.getpid()), number, *command]
print(subprocess.Popen(words).pid, flush=True)
time.sleep(600)
"""
SLEEPER = (sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)")


def test_a_command_dies_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen(
        [*ISOLATED, "-c", PARENT, dies_with_parent.__file__, str(signal.SIGKILL.value), *SLEEPER],
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        # It is the command itself once it has replaced the script.
        while SLEEPER[-1] not in child.cmdline():
            assert child.is_running() and parent.poll() is None
        parent.kill()
    until = time.monotonic() + PATIENCE_S
    while is_alive(child.pid):
        assert time.monotonic() < until
        time.sleep(0.01)


def run(*arguments: str, parent_pid: int | None = None) -> "subprocess.CompletedProcess[str]":
    words = (str(parent_pid or os.getpid()), str(signal.SIGKILL.value), *arguments)
    return subprocess.run(
        [*ISOLATED, dies_with_parent.__file__, *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_a_command_runs_as_itself_with_its_arguments_and_its_status() -> None:
    done = run(sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(7)", "a b", "--c")
    assert (done.stdout, done.returncode) == ("['a b', '--c']\n", 7)


def test_a_command_whose_parent_is_gone_already_does_not_start() -> None:
    done = run(sys.executable, "-c", "print('started')", parent_pid=os.getppid())
    assert done.returncode == 1 and done.stdout == ""
    assert "the parent died first" in done.stderr


def test_a_command_that_is_not_there_is_an_error() -> None:
    assert "FileNotFoundError" in run("/no/such/command").stderr
