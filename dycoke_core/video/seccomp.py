"""Seccomp: leaves this process the system calls that decoding needs, and no others.

An allow-list: memory (none of it executable: all code is loaded before), threads, clocks, reading
what is open, opening (which Landlock confines). Everything else is answered with ENOSYS, as by a
kernel that lacks it, so that libc falls back where it can (clone3 to clone) and fails where it
must: no sockets, no new programs or processes, no signals, no ptrace, no io_uring, no mount, no
limits raised.

The filter is assembled here rather than by libseccomp. A flat list on one architecture is thirty
lines, and images without libseccomp.so.2 need no exception. x86-64 only; elsewhere `install_filter`
raises.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Sequence

_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_AUDIT_ARCH_X86_64 = 0xC000003E
CLONE = 56
_CLONE_THREAD = 0x00010000
_PROT_EXEC = 4
_O_PATH = 0o10000000

# Numbers of x86-64.
_ALLOWED = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "pread64": 17, "readv": 19,
    "writev": 20, "newfstatat": 262,
    "munmap": 11, "brk": 12, "mremap": 25, "madvise": 28,
    "futex": 202, "set_robust_list": 273, "rseq": 334, "sched_yield": 24, "sched_getaffinity": 204,
    "getpid": 39, "gettid": 186, "exit": 60, "exit_group": 231,
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sigaltstack": 131,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "nanosleep": 35,
    "gettimeofday": 96, "restart_syscall": 219, "getrandom": 318, "sysinfo": 99, "getrusage": 98,
}  # fmt: skip

# Allowed without these bits in their third argument. A descriptor of O_PATH is none that Landlock
# looks at: it would tell which files there are.
_ALLOWED_WITHOUT = {
    ("mmap", 9): _PROT_EXEC, ("mprotect", 10): _PROT_EXEC, ("openat", 257): _O_PATH,
}  # fmt: skip

# Classic BPF, on struct seccomp_data {int nr; u32 arch; u64 ip; u64 args[6]}.
_LOAD, _JUMP_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NR_OFFSET, _ARCH_OFFSET, _ARG0_OFFSET, _ARG2_OFFSET = 0, 4, 16, 32
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_ASK = 0x7FC00000  # SECCOMP_RET_USER_NOTIF; a refusal of another filter comes first


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install_filter() -> None:
    """Confines every thread this process will have, for good. It has given up new privileges.

    Raises:
        OSError: no filter for this architecture, or the kernel refused it.
    """
    program = _program(_allow_list())
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


def filter_asking_about(number: int) -> Program:
    """Returns a filter that lets a listener decide on one system call, and allows all others.

    Raises:
        OSError: no filter for this architecture.
    """
    return _program(
        [
            (_LOAD, 0, 0, _ARCH_OFFSET),
            (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
            (_RETURN, 0, 0, _KILL_PROCESS),
            (_LOAD, 0, 0, _NR_OFFSET),
            (_JUMP_EQUAL, 0, 1, number),
            (_RETURN, 0, 0, _ASK),
            (_RETURN, 0, 0, _ALLOW),
        ]
    )


def _program(instructions: Sequence[tuple[int, int, int, int]]) -> Program:
    if os.uname().machine != "x86_64":
        raise OSError(errno.ENOSYS, "seccomp: no filter for this architecture")
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    return Program(len(instructions), code)


def _allow_list() -> list[tuple[int, int, int, int]]:
    """Jumps are relative: (if true, if false) count the instructions to skip."""
    instructions = [
        (_LOAD, 0, 0, _ARCH_OFFSET),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NR_OFFSET),
        (_JUMP_EQUAL, 0, 4, CLONE),  # threads, but no processes
        (_LOAD, 0, 0, _ARG0_OFFSET),
        (_JUMP_ANY_BIT, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]
    for (_, number), bits in _ALLOWED_WITHOUT.items():
        instructions += [
            (_JUMP_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, _ARG2_OFFSET),
            (_JUMP_ANY_BIT, 1, 0, bits),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        ]
    for number in _ALLOWED.values():
        instructions += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    instructions.append((_RETURN, 0, 0, _ERRNO | errno.ENOSYS))
    return instructions
