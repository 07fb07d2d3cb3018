"""What a child does once an attacker's code runs in it. Run by a fork server in the tests."""

import ctypes
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dycoke_core.video.child import Task, TaskError, Tasks

Result = dict[str, Any]


def eat_memory(task: Task) -> Result:
    hoard = []
    while True:
        hoard.append(bytearray(32 * 2**20))


def die_of_memory(task: Task) -> Result:
    """As a native library does: an allocation fails, and it aborts."""
    hoard = []
    try:
        while True:
            hoard.append(bytearray(b"x") * (32 * 2**20))
    except MemoryError:
        ctypes.string_at(0)
    return {}


def spin(task: Task) -> Result:
    while True:
        pass


def spin_natively(task: Task) -> Result:
    """Holds the interpreter's lock forever."""
    return {"never": sum(range(10**15))}


def sleep(task: Task) -> Result:
    time.sleep(3600)
    return {}


def crash(task: Task) -> Result:
    ctypes.string_at(0)
    return {}


_callback = ctypes.CFUNCTYPE(None)(lambda: None)


def overwrite_code(task: Task) -> Result:
    """Of a callback, which some builds of libffi keep in memory that can be both."""
    address = ctypes.cast(_callback, ctypes.c_void_p)
    ctypes.memmove(address, address, 1)
    return {}


def exit_silently(task: Task) -> Result:
    os._exit(0)


def fail(task: Task) -> Result:
    raise ValueError("a bug")


def report_unreadable(task: Task) -> Result:
    raise TaskError("unreadable", "no good")


def invent_an_error(task: Task) -> Result:
    raise TaskError("you_are_hacked", "<script>")


def babble(task: Task) -> Result:
    while True:
        task.report_progress(0.5)


def echo(task: Task) -> Result:
    task.report_progress(0.25)
    task.report_progress(0.75)
    return dict(task.params)


def echo_later(task: Task) -> Result:
    time.sleep(1.0)
    return echo(task)


def write_pixels(task: Task) -> Result:
    assert task.pixels is not None
    task.pixels[:] = task.params["value"]
    return {}


def read_the_video(task: Task) -> Result:
    with open(task.video_path, "rb") as video:
        return {"content": video.read().decode()}


def list_descriptors(task: Task) -> Result:
    return {"open": [fd for fd in range(3, 1024) if _succeeds(lambda fd=fd: os.fstat(fd))]}


def start_threads(task: Task) -> Result:
    threads = [threading.Thread(target=time.sleep, args=(0.01,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"num_threads": len(threads)}


def start_as_many_threads_as_it_may(task: Task) -> Result:
    threading.stack_size(2**16)
    may_end = threading.Event()
    threads: list[threading.Thread] = []
    try:
        while len(threads) < 500:
            threads.append(threading.Thread(target=may_end.wait, daemon=True))
            threads[-1].start()
    except RuntimeError:
        return {"num_threads": len(threads)}  # with the first, without the one that was refused
    finally:
        may_end.set()
    return {"num_threads": 500}


def ask_for_threads_for_ever(task: Task) -> Result:
    while True:
        with suppress(RuntimeError):
            threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()


def try_everything(task: Task) -> Result:
    """Returns what was tried of what must not be possible, and what was possible of it."""
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getppid()
    attempts: dict[str, Callable[[], Any]] = {
        "open a file": lambda: os.open(task.params["other_path"], os.O_RDONLY),
        "open its own source": lambda: os.open(__file__, os.O_RDONLY),
        "open the video for writing": lambda: os.open(task.video_path, os.O_WRONLY),
        "list a directory": lambda: os.listdir("/"),
        "create a file": lambda: Path(task.params["other_path"] + ".new").write_text("x"),
        "remove a file": lambda: os.unlink(task.params["other_path"]),
        "read a process's memory": lambda: os.open(f"/proc/{parent}/mem", os.O_RDONLY),
        "make an internet socket": lambda: socket.socket(socket.AF_INET),
        "make a unix socket": lambda: socket.socket(socket.AF_UNIX),
        "make a socket pair": socket.socketpair,
        "see whether a file is there": lambda: os.open(task.params["other_path"], os.O_PATH),
        "make memory executable": lambda: mmap.mmap(
            -1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        ),
        "fork": os.fork,
        "execute": lambda: os.execv(sys.executable, [sys.executable, "-c", "pass"]),
        "start a program": lambda: subprocess.run([sys.executable, "-c", "pass"], check=True),
        "signal the server": lambda: os.kill(parent, 0),
        "signal itself": lambda: signal.raise_signal(signal.SIGUSR1),
        "make an anonymous file": lambda: os.memfd_create("x"),
        "make a pipe": os.pipe,
        "raise its limits": lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)),
    }
    raw: dict[str, tuple[int, ...]] = {
        "ptrace": (101, 0, 0, 0, 0),
        "io_uring_setup": (425, 1, 0),
        "process_vm_readv": (310, parent, 0, 0, 0, 0, 0),
        "mount": (165, 0, 0, 0, 0, 0),
        "unshare": (272, 0x10000000),
        "bpf": (321, 0, 0, 0),
        "userfaultfd": (323, 0),
        "keyctl": (250, 0, 0, 0, 0, 0),
        "pidfd_open": (434, parent, 0),
        "setuid": (105, 0),
    }
    later = "make memory executable later"
    possible = [name for name, attempt in attempts.items() if _succeeds(attempt)]
    possible += [name for name, call in raw.items() if _is_there(libc, call)]
    page = libc.mmap
    page.restype, page.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *[ctypes.c_long] * 5]
    address = page(None, 4096, 3, 0x22, -1, 0)
    if libc.mprotect(ctypes.c_void_p(address), 4096, mmap.PROT_READ | mmap.PROT_EXEC) == 0:
        possible.append(later)
    return {"tried": [*attempts, *raw, later], "possible": possible}


def _succeeds(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except (OSError, ValueError, subprocess.SubprocessError):
        return False
    return True


def _is_there(libc: ctypes.CDLL, call: tuple[int, ...]) -> bool:
    """Whether the system call exists for this process: all errors but ENOSYS come from inside."""
    return libc.syscall(*call) >= 0 or ctypes.get_errno() != 38


TASKS: Tasks = {
    task.__name__: task
    for task in (
        eat_memory,
        die_of_memory,
        spin,
        spin_natively,
        sleep,
        crash,
        overwrite_code,
        exit_silently,
        fail,
        report_unreadable,
        invent_an_error,
        babble,
        echo,
        echo_later,
        write_pixels,
        read_the_video,
        list_descriptors,
        start_threads,
        start_as_many_threads_as_it_may,
        ask_for_threads_for_ever,
        try_everything,
    )
}
