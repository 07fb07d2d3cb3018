"""A child as its parent sees it: what it is allowed, what it replies, how it ended.

Nothing that it reports is trusted. Knows nothing of videos.
"""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dycoke_core.video.child import MAX_MESSAGE_BYTES
from dycoke_core.video.types import FailureCode

_MAX_REPLY_BYTES = 256 * 1024
_MAX_DETAIL_CHARACTERS = 300
# What a child may say of itself. Everything else is concluded from how it ended.
_REPORTED: dict[str, FailureCode] = {
    "no_video": "no_video",
    "unknown_codec": "unknown_codec",
    "unreadable": "unreadable",
    "too_many_frames": "too_many_frames",
    "memory": "memory",
    "exception": "exception",
}


class TaskFailure(Exception):
    """A child brought no result. `detail` is its own words: for logs, never for clients."""

    def __init__(self, code: FailureCode, detail: str = "") -> None:
        super().__init__(code)
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Confinement:
    """What `sandbox.confine` gets in each child."""

    memory_bytes: int
    cpu_s: int
    is_strict: bool
    max_threads: int = 6  # all of them; decord adds one

    def with_threads(self, number: int) -> "Confinement":
        """For a child that decodes with this many threads: each brings its CPU time and, in some
        decoders, another one.
        """
        return replace(
            self, cpu_s=self.cpu_s * number, max_threads=self.max_threads + 2 * (number - 1)
        )


@dataclass(slots=True, eq=False)
class ForkedChild:
    """One running child. Its replies come through a pipe, the news of its end from the server."""

    confinement: Confinement
    reply_fd: int
    on_progress: Callable[[float], None]
    ended: asyncio.Future[Mapping[str, Any]]  # the server's message; empty if the server died
    num_received_bytes: int = 0
    unparsed: bytes = b""
    final_reply: Any = None

    def read_replies(self) -> bool:
        """Takes what has come. False once no more is wanted: at the end, and from a babbler."""
        while not self.is_babbling:
            try:
                chunk = os.read(self.reply_fd, MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            self.num_received_bytes += len(chunk)
            *lines, self.unparsed = (self.unparsed + chunk).split(b"\n")
            for line in lines:
                self._take(line)
        return False

    @property
    def is_babbling(self) -> bool:
        return self.num_received_bytes > _MAX_REPLY_BYTES

    def result(self) -> Any:
        """Returns the result, once it has ended, or raises its failure."""
        if self.is_babbling:
            raise TaskFailure("crash", "too many replies")
        reply = self.final_reply
        if isinstance(reply, dict):
            if "result" in reply:
                return reply["result"]
            code = reply.get("error")
            if isinstance(code, str) and code in _REPORTED:
                detail = ascii(reply.get("detail"))[:_MAX_DETAIL_CHARACTERS]
                raise TaskFailure(_REPORTED[code], detail)
        raise TaskFailure(_cause_of_end(self.ended.result(), self.confinement))

    def _take(self, line: bytes) -> None:
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        share = reply.get("progress") if isinstance(reply, dict) else None
        if isinstance(share, float | int) and 0 <= share <= 1:
            self.on_progress(float(share))
        else:
            self.final_reply = reply


def _cause_of_end(ended: Mapping[str, Any], confinement: Confinement) -> FailureCode:
    """Infers why a child ended without a reply. Where the kernel does not say, by its usage."""
    if not ended:  # with its server
        return "killed"
    if "status" not in ended:
        return "no_process"
    if not os.WIFSIGNALED(ended["status"]):
        return "exception"
    killed_by = os.WTERMSIG(ended["status"])
    if killed_by == signal.SIGXCPU or ended["cpu_s"] >= confinement.cpu_s:
        return "cpu"
    if killed_by == signal.SIGKILL:  # none of its own limits does that: the kernel, or an operator
        return "killed"
    # A library that died of an allocation that failed, or of itself.
    return "memory" if ended["max_rss_bytes"] >= confinement.memory_bytes / 2 else "crash"
