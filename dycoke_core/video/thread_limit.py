"""How many threads a reading child may have: its server is asked before each new one.

An address space bounds threads by their stacks, unless they share one: then thousands fit, and no
one else on the machine can start a process. RLIMIT_NPROC does not hold for root, and counts what
all processes of a user have. So a separate seccomp filter passes every `clone` to the holder of the
listener (seccomp_unotify(2), Linux 5.5), which counts the existing threads.

A child that asks from many threads at once may be allowed one for each before the first appears:
twice the limit is the bound.
"""

import array
import ctypes
import errno
import fcntl
import os
import socket
import struct
from contextlib import suppress

from dycoke_core.video.seccomp import CLONE, filter_asking_about

_SECCOMP = 317  # x86-64
_SET_MODE_FILTER, _NEW_LISTENER = 1, 8
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # _IOWR('!', 0, 80 bytes), _IOWR('!', 1, 24 bytes)
_NOTIFICATION_BYTES = 80
_CONTINUE = 1
_HANDED_OVER = b"l"

_libc = ctypes.CDLL(None, use_errno=True)


def ask_before_each_thread(server: socket.socket) -> None:
    """Hands the right to allow this process threads to `server`, for good. It has given up new
    privileges.

    Raises:
        OSError: the kernel cannot do that, or somebody else holds that right already.
    """
    program = filter_asking_about(CLONE)
    listener = int(_libc.syscall(_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, ctypes.byref(program)))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp listener")
    try:
        fds = array.array("i", [listener])
        server.sendmsg([_HANDED_OVER], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    finally:
        os.close(listener)


def receive_listener(child: socket.socket) -> int | None:
    """Returns what a child has handed over; None from one that ended, or cannot be limited."""
    with suppress(ConnectionError):
        _, fds, _, _ = socket.recv_fds(child, 1, 1)
        return fds[0] if fds else None
    return None


def answer(listener: int, max_threads: int) -> None:
    """Answers one request for a thread, if there still is one."""
    request = bytearray(_NOTIFICATION_BYTES)
    try:
        fcntl.ioctl(listener, _RECEIVE, request)
        request_id, thread_id = struct.unpack_from("=QI", request)
        if _num_threads(thread_id) < max_threads:
            response = struct.pack("=QqiI", request_id, 0, 0, _CONTINUE)
        else:
            response = struct.pack("=QqiI", request_id, 0, -errno.EAGAIN, 0)
        fcntl.ioctl(listener, _SEND, response)
    except OSError:  # who asked is gone
        return


def _num_threads(thread_id: int) -> int:
    """Of the process that a thread belongs to."""
    with open(f"/proc/{thread_id}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))
