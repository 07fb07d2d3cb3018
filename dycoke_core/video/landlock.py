"""Landlock: takes the file system from this process, except reading one file it already has open.

Knows nothing of videos. Needs Linux 5.13 with Landlock enabled; no privileges, but that
the process has given up new ones. Does not cover what is open already, nor `stat`.
"""

import ctypes
import os
import struct

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_VERSION_FLAG = 1
_RULE_PATH_BENEATH = 1

_READ_FILE = 1 << 2
_NUM_FS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # by ABI version
_NUM_FS_RIGHTS_NEWEST = 16
_NET_BIND_AND_CONNECT_TCP = 0b11  # from ABI 4
_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11  # from ABI 6

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_abi() -> int:
    """Returns the version that this kernel offers, 0 where it offers none."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG)))


def allow_reading_only(fd: int) -> None:
    """From here on this process may open the file behind `fd` for reading, and no other.

    Raises:
        OSError: Landlock is missing or refused.
    """
    attr = _ruleset_attr(landlock_abi())
    ruleset = _checked(_CREATE_RULESET, attr, ctypes.c_size_t(len(attr)), 0)
    try:
        _checked(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", _READ_FILE, fd), 0)
        _checked(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _ruleset_attr(abi: int) -> bytes:
    """Everything that this version can deny: struct landlock_ruleset_attr, as long as it knows."""
    fields = [(1 << _NUM_FS_RIGHTS.get(abi, _NUM_FS_RIGHTS_NEWEST)) - 1]
    if abi >= 4:
        fields.append(_NET_BIND_AND_CONNECT_TCP)
    if abi >= 6:
        fields.append(_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS)
    return struct.pack(f"={len(fields)}Q", *fields)


def _checked(number: int, *args: object) -> int:
    result = int(_libc.syscall(number, *args))
    if result < 0:
        raise OSError(ctypes.get_errno(), "landlock")
    return result
