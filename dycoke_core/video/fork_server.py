"""A clean, single-threaded process that forks one child per task: `python -m ... FD MODULE`.

The API has threads and megabytes that a fork would copy, and starting an interpreter with its video
library takes a quarter of a second. This process imports MODULE (one video library: decord's wheel
and PyAV's each carry an FFmpeg, and in one process calls of one land in the other) and then does
nothing but fork, kill and reap, and answer children that want another thread (`thread_limit`). It
never looks at a video.

On the socket FD (SOCK_SEQPACKET) it takes
    {"run": id, "task": {...}} with the descriptors [video, replies, pixels?], and {"kill": id},
and answers each run, once, with
    {"exited": id, "status": as of waitpid, "max_rss_bytes": n, "cpu_s": x},
or with {"exited": id} alone where it could not fork.
When the other end closes it kills and reaps its children and exits. If it is killed itself, the
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

from dycoke_core.video import child, thread_limit
from dycoke_core.video.child import MAX_MESSAGE_BYTES

_MAX_FDS = 3
_PR_SET_PDEATHSIG = 1


class _Child:
    """A running child, and the thread limit that it is under once it has handed that over."""

    def __init__(self, task_id: int, pid: int, handover: socket.socket, max_threads: int) -> None:
        self.task_id = task_id
        self._pid = pid
        self._max_threads = max_threads
        self._handover: socket.socket | None = handover
        self._listener: int | None = None
        self.pidfd = os.pidfd_open(pid)  # readable at its end

    @property
    def fds(self) -> list[int]:
        """What is to be watched."""
        handover = [] if self._handover is None else [self._handover.fileno()]
        return [self.pidfd, *handover, *([] if self._listener is None else [self._listener])]

    def on_event(self, fd: int, event: int) -> None:
        """Called when one of them but the pidfd is ready."""
        if self._handover is not None and fd == self._handover.fileno():
            self._listener = thread_limit.receive_listener(self._handover)
            self._handover.close()
            self._handover = None
        elif event & select.POLLIN:
            thread_limit.answer(fd, self._max_threads)
        else:  # there is no one left to ask
            self._close_listener()

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)  # not reaped yet, so the number is still its own

    def reap(self) -> dict[str, Any]:
        os.close(self.pidfd)
        if self._handover is not None:
            self._handover.close()
        self._close_listener()
        _, status, usage = os.wait4(self._pid, 0)
        cpu_s = usage.ru_utime + usage.ru_stime
        rss = usage.ru_maxrss * 1024
        return {"exited": self.task_id, "status": status, "max_rss_bytes": rss, "cpu_s": cpu_s}

    def _close_listener(self) -> None:
        if self._listener is not None:
            os.close(self._listener)
            self._listener = None


class Server:
    """Takes requests from `control` until its other end closes."""

    def __init__(self, control: socket.socket, tasks: child.Tasks) -> None:
        self._control = control
        self._tasks = tasks
        self._children: list[_Child] = []

    def run(self) -> None:
        while True:
            ready = self._wait()
            for each in list(self._children):
                events = {fd: ready[fd] for fd in each.fds if fd in ready}
                if each.pidfd in events:
                    self._children.remove(each)
                    self._send(each.reap())
                    continue
                for fd, event in events.items():
                    each.on_event(fd, event)
            if self._control.fileno() in ready and not self._take_request():
                for each in self._children:
                    each.kill()
                    each.reap()
                return

    def _wait(self) -> dict[int, int]:
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        for each in self._children:
            for fd in each.fds:
                poller.register(fd, select.POLLIN)
        return dict(poller.poll())

    def _take_request(self) -> bool:
        """False once the other end has closed or died."""
        try:
            payload, fds, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, _MAX_FDS)
        except ConnectionError:  # it died with a message of ours unread
            return False
        if not payload:
            return False
        message = json.loads(payload)
        if "kill" in message:
            for each in self._children:
                if each.task_id == message["kill"]:
                    each.kill()
            return True
        try:
            self._children.append(_fork(message["run"], message["task"], fds, self._tasks))
        except OSError:  # no more processes, memory or descriptors
            self._send({"exited": message["run"]})
        for fd in fds:
            os.close(fd)
        return True

    def _send(self, message: dict[str, Any]) -> None:
        with suppress(ConnectionError):  # the other end has closed, too
            self._control.send(json.dumps(message).encode())


def _fork(task_id: int, task: dict[str, Any], fds: list[int], tasks: child.Tasks) -> _Child:
    """Returns the child, in the server alone.

    Raises:
        OSError: there is none.
    """
    server_pid = os.getpid()
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            raise
        if pid == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != server_pid:  # it died before the line above
                os._exit(1)
            child.run(task, fds, theirs, tasks)
    try:
        return _Child(task_id, pid, ours, task["confinement"]["max_threads"])
    except OSError:  # no pidfd
        ours.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def main() -> None:
    # Sent to a whole terminal or service; its parent drains first, then closes the socket.
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    tasks: child.Tasks = importlib.import_module(sys.argv[2]).TASKS
    Server(control, tasks).run()


if __name__ == "__main__":
    main()
