"""Memory that a child writes pixels into and its parent reads when the child is gone.

An anonymous file of a fixed size: nothing to unlink, freed with its last descriptor or mapping. The
seals keep a child from shrinking it under the parent's feet.
"""

import fcntl
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@contextmanager
def open_frame_buffer(shape: Sequence[int]) -> Iterator[int]:
    """Yields the descriptor of a new buffer for uint8 pixels of this shape."""
    fd = os.memfd_create("frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, math.prod(shape))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        yield fd
    finally:
        os.close(fd)


def map_for_writing(fd: int, shape: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Returns the buffer itself; the child's side."""
    memory = mmap.mmap(fd, math.prod(shape), access=mmap.ACCESS_WRITE)
    return np.frombuffer(memory, dtype=np.uint8).reshape(shape)


def map_pixels(fd: int, shape: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Returns the content, without a copy; the parent's side, after the child's end.

    A private mapping: what the caller writes is its own. It keeps the memory, and a descriptor, for
    as long as the array is in use.
    """
    memory = mmap.mmap(fd, math.prod(shape), access=mmap.ACCESS_COPY)
    return np.frombuffer(memory, dtype=np.uint8).reshape(shape)
