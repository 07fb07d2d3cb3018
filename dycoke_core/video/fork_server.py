"""A clean, single-threaded process that forks one child per task: `python -m ... FD MODULE`.

The API has threads and megabytes that a fork would copy, and starting an interpreter with its video
library takes a quarter of a second. This process imports MODULE (one video library: decord's wheel
and PyAV's each carry an FFmpeg, and in one process calls of one land in the other) and then does
nothing but fork, kill and reap. It never looks at a video.

On the socket FD (SOCK_SEQPACKET) it takes
    {"run": id, "task": {...}} with the descriptors [video, replies, pixels?], and {"kill": id},
and answers each run, once, with
    {"exited": id, "status": as of waitpid, "max_rss_bytes": n, "cpu_s": x},
or with {"exited": id} alone where it could not fork.
When the other end closes it kills and reaps its children and exits. Should it be killed itself, the
kernel kills them (PR_SET_PDEATHSIG).
"""

import ctypes
import importlib
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

from dycoke_core.video import child
from dycoke_core.video.child import MAX_MESSAGE_BYTES

_MAX_FDS = 3
_PR_SET_PDEATHSIG = 1


class _Children:
    """The running children: id of the task and process id, by pidfd."""

    def __init__(self) -> None:
        self._by_pidfd: dict[int, tuple[int, int]] = {}

    def add(self, task_id: int, pid: int) -> int:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self._by_pidfd[pidfd] = (task_id, pid)
        return pidfd

    def kill(self, task_id: int) -> None:
        """Does nothing if the task has ended."""
        for other_id, pid in self._by_pidfd.values():
            if other_id == task_id:
                os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own

    def end(self) -> None:
        for task_id, _ in list(self._by_pidfd.values()):
            self.kill(task_id)
        for pidfd in list(self._by_pidfd):
            self.reap(pidfd)

    def reap(self, pidfd: int) -> dict[str, Any]:
        task_id, pid = self._by_pidfd.pop(pidfd)
        os.close(pidfd)
        _, status, usage = os.wait4(pid, 0)
        cpu_s = usage.ru_utime + usage.ru_stime
        rss = usage.ru_maxrss * 1024
        return {"exited": task_id, "status": status, "max_rss_bytes": rss, "cpu_s": cpu_s}


def serve(control: socket.socket, tasks: child.Tasks) -> None:
    """Runs until the other end closes."""
    children = _Children()
    poller = select.poll()
    poller.register(control, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            if fd != control.fileno():
                poller.unregister(fd)
                _send(control, children.reap(fd))
                continue
            payload, fds = _receive(control)
            if not payload:
                children.end()
                return
            message = json.loads(payload)
            if "kill" in message:
                children.kill(message["kill"])
                continue
            try:
                pidfd = children.add(message["run"], _fork(message["task"], fds, tasks))
                poller.register(pidfd, select.POLLIN)
            except OSError:  # no more processes, memory or descriptors
                _send(control, {"exited": message["run"]})
            for passed in fds:
                os.close(passed)


def _send(control: socket.socket, message: dict[str, Any]) -> None:
    with suppress(ConnectionError):  # the other end has closed, too
        control.send(json.dumps(message).encode())


def _receive(control: socket.socket) -> tuple[bytes, list[int]]:
    """The next message and its descriptors; nothing once the other end has closed or died."""
    try:
        payload, fds, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, _MAX_FDS)
    except ConnectionError:  # it died with a message of ours unread
        return b"", []
    return payload, fds


def _fork(task: dict[str, Any], fds: list[int], tasks: child.Tasks) -> int:
    server_pid = os.getpid()
    pid = os.fork()
    if pid != 0:
        return pid
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server_pid:  # it died before the line above
        os._exit(1)
    child.run(task, fds, tasks)


def main() -> None:
    # Sent to a whole terminal or service; its parent drains first, then closes the socket.
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    tasks: child.Tasks = importlib.import_module(sys.argv[2]).TASKS
    serve(control, tasks)


if __name__ == "__main__":
    main()
