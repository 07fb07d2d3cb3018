"""What a reading child may do: `confine`, called in the child, and what of it this system can do.

In force afterwards: rlimits on memory, CPU time, written bytes, core files and open files; no
memory both writable and executable; Landlock with one readable file; a number of threads
(`thread_limit`); the seccomp allow-list. Wall time is bounded by the parent.
"""

import ctypes
import os
import resource
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from dycoke_core.video.landlock import allow_reading_only
from dycoke_core.video.seccomp import install_filter
from dycoke_core.video.thread_limit import ask_before_each_thread

_MAX_OPEN_FILES = 16
_SMALL_STACK_BYTES = 2**16
_READ_AND_EXECUTE = 5
_PR_SET_NO_NEW_PRIVS = 38
_ASK_PERSONALITY, _ADDR_NO_RANDOMIZE = 0xFFFFFFFF, 0x0040000

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class SandboxState:
    """What children were refused in a test: observed, not concluded from a version."""

    landlock_abi: int
    refuses_files: bool
    refuses_sockets: bool
    refuses_processes: bool
    refuses_threads: bool  # beyond the limit

    @property
    def is_complete(self) -> bool:
        calls = self.refuses_sockets and self.refuses_processes
        return self.refuses_files and calls and self.refuses_threads

    def describe(self) -> str:
        """One line for the log at start."""
        files = f"Landlock ABI {self.landlock_abi}" if self.refuses_files else "NO Landlock"
        has_filter = self.refuses_sockets and self.refuses_processes
        calls = "seccomp allow-list" if has_filter else "NO seccomp"
        threads = "thread limit" if self.refuses_threads else "NO thread limit"
        verb = "are sandboxed" if self.is_complete else "are NOT fully sandboxed"
        return f"frame readers {verb}: {files}, {calls}, {threads}, rlimits"


def confine(
    video_fd: int,
    server: socket.socket,
    *,
    memory_bytes: int,
    cpu_s: int,
    max_threads: int,
    is_strict: bool,
) -> None:
    """Confines this process to reading the file behind `video_fd`, for good.

    Args:
        server: is asked before each new thread, and closed. It keeps to `max_threads`.
        is_strict: if false, what the system lacks is left out.

    Raises:
        OSError: with `is_strict`, the system lacks Landlock or seccomp.
    """
    tolerated = () if is_strict else (OSError,)
    _protect_code()
    with suppress(*tolerated):
        _give_up_new_privileges()
    _limit(resource.RLIMIT_AS, memory_bytes, memory_bytes)
    _limit(resource.RLIMIT_CPU, cpu_s, cpu_s + 1)  # SIGXCPU first, which gives the reason
    _limit(resource.RLIMIT_FSIZE, 0, 0)
    _limit(resource.RLIMIT_CORE, 0, 0)
    _limit(resource.RLIMIT_NOFILE, _MAX_OPEN_FILES, _MAX_OPEN_FILES)
    with suppress(*tolerated):
        allow_reading_only(video_fd)
    with server, suppress(*tolerated):
        ask_before_each_thread(server)
    with suppress(*tolerated):
        install_filter()


def has_random_layout() -> bool:
    """Whether a new process gets its own addresses for stack, heap and libraries."""
    try:
        with open("/proc/sys/kernel/randomize_va_space") as file:
            is_on = file.read().strip() == "2"
    except OSError:
        return False
    return is_on and not _libc.personality(_ASK_PERSONALITY) & _ADDR_NO_RANDOMIZE


def _give_up_new_privileges() -> None:
    """What Landlock and seccomp require unless one is root: no program gains rights any more."""
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs")


def _protect_code() -> None:
    """Makes memory unwritable that is executable, too: where ctypes keeps its callbacks. None may
    be made or freed from here on.
    """
    with open("/proc/self/maps") as maps:
        ranges = [line.split(maxsplit=2)[:2] for line in maps]
    for addresses, rights in ranges:
        if "w" in rights and "x" in rights:
            start, end = (int(address, 16) for address in addresses.split("-"))
            _libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _READ_AND_EXECUTE)


def _limit(kind: int, soft: int, hard: int) -> None:
    """Lowers a limit; a lower one that was inherited stays."""
    _, inherited = resource.getrlimit(kind)
    if inherited != resource.RLIM_INFINITY:
        soft, hard = min(soft, inherited), min(hard, inherited)
    resource.setrlimit(kind, (soft, hard))


def observe_refusals(max_threads: int) -> dict[str, bool]:
    """Tries, in a confined process, what must fail; returns the fields of `SandboxState`."""
    return {
        "refuses_files": _is_refused(lambda: os.close(os.open("/", os.O_RDONLY))),
        "refuses_sockets": _is_refused(lambda: socket.socket(socket.AF_INET).close())
        and _is_refused(lambda: socket.socket(socket.AF_UNIX).close()),
        "refuses_processes": _is_refused(_fork),
        "refuses_threads": not _can_start_threads(max_threads),
    }


def _can_start_threads(number: int) -> bool:
    """Whether this many can run at once, in addition to this one."""
    may_end = threading.Event()
    threading.stack_size(_SMALL_STACK_BYTES)
    try:
        for _ in range(number):
            threading.Thread(target=may_end.wait, daemon=True).start()
    except RuntimeError:
        return False
    finally:
        may_end.set()
    return True


def _is_refused(attempt: Callable[[], None]) -> bool:
    try:
        attempt()
    except OSError:
        return True
    return False


def _fork() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
