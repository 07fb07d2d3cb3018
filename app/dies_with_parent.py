"""Runs a command in place of itself, so that the command dies with the process that started it.

    python -I -S dies_with_parent.py PARENT_PID SIGNAL_NUMBER COMMAND [ARGUMENT ...]

The kernel sends the signal when the parent is gone, however it went; the setting survives exec.
A separate program, on the standard library, because code between fork and exec of a threaded parent
can deadlock. Only Linux has this; elsewhere the command just runs.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(parent_pid: int, signal_number: int, command: list[str]) -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        sys.exit("the parent died first")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
