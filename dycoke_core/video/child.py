"""What happens in a forked child: confine, do one task, reply, exit.

Replies are lines of JSON on a pipe: any number of {"progress": 0..1}, then one of {"result": {...}}
and {"error": code, "detail": text}. Their reader must not trust them: from the moment a video is
opened, this process may be under an attacker's control.
"""

import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from dycoke_core.video.frame_buffer import map_for_writing
from dycoke_core.video.sandbox import confine, observe_refusals

MAX_MESSAGE_BYTES = 64 * 1024  # to and from a server
_MAX_DETAIL_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to do with one video."""

    params: Mapping[str, Any]
    num_threads: int  # to decode with
    video_path: str  # a name of our own, which says nothing to a demuxer
    # [F, height, width, 3] to be written, shared with the parent.
    pixels: npt.NDArray[np.uint8] | None
    report_progress: Callable[[float], None]
    complaints: Callable[[], bytes]  # what libraries have printed to stderr since the last call


Tasks = dict[str, Callable[[Task], dict[str, Any]]]
_COMMON_TASKS: Tasks = {
    "observe_refusals": lambda task: {**observe_refusals(task.params["max_threads"])}
}


class TaskError(Exception):
    """The video is at fault; `code` is one of `frame_readers.TASK_ERRORS`."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(detail)
        self.code = code


def run(message: dict[str, Any], fds: list[int], server: socket.socket, tasks: Tasks) -> NoReturn:
    """Does the task and ends the process, whatever happens, without clean-up: the server's exit
    handlers and a decoder's threads are in it.

    Args:
        fds: the video, where replies go, and where there is one the frame buffer.
        server: takes over the right to allow this process threads.
    """
    try:
        _keep_only([*fds, server.fileno()])
        _run(message, fds, server, tasks)
    finally:
        os._exit(0)


def _run(message: dict[str, Any], fds: list[int], server: socket.socket, tasks: Tasks) -> None:
    video_fd, reply_fd = fds[0], fds[1]

    def reply(line: dict[str, Any]) -> None:
        os.write(reply_fd, json.dumps(line).encode() + b"\n")

    try:
        task = Task(
            params=message["params"],
            num_threads=message["num_threads"],
            video_path=f"/proc/self/fd/{video_fd}",
            pixels=map_for_writing(fds[2], message["shape"]) if len(fds) > 2 else None,
            report_progress=lambda share: reply({"progress": round(share, 3)}),
            complaints=_complaints,
        )
        _die_first_when_memory_is_short()
        confine(video_fd, server, **message["confinement"])
        reply({"result": (tasks | _COMMON_TASKS)[message["name"]](task)})
    except TaskError as error:
        reply({"error": error.code, "detail": str(error)[:_MAX_DETAIL_CHARACTERS]})
    except MemoryError:
        reply({"error": "memory", "detail": ""})
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        reply({"error": "exception", "detail": detail[:_MAX_DETAIL_CHARACTERS]})


def _keep_only(fds: list[int]) -> None:
    """Closes what the server has open. What is printed to stderr can be read from stdin, and is
    lost where that is full.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    said, says = os.pipe2(os.O_NONBLOCK)
    for standard, fd in enumerate((said, nowhere, says)):
        os.dup2(fd, standard)
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        if fd > 2 and fd not in fds:
            with suppress(OSError):  # the listing's own, closed by now
                os.close(fd)


def _complaints() -> bytes:
    try:
        return os.read(0, MAX_MESSAGE_BYTES)
    except BlockingIOError:
        return b""


def _die_first_when_memory_is_short() -> None:
    """The kernel's out-of-memory killer takes a reader rather than the service, where it may."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
