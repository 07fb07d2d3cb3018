"""What an exception out of a sequence's work means: for the engine, and for the client."""

import torch

from dycoke_core.errors import DycokeError, EngineError, OutOfMemoryError


def has_broken_device(error: Exception) -> bool:
    """Whether every later call would fail too: after most CUDA errors the process is lost."""
    is_memory = isinstance(error, torch.OutOfMemoryError)
    return not is_memory and isinstance(error, RuntimeError) and "CUDA error" in str(error)


def public_error(error: Exception) -> DycokeError:
    """What a client may read of a failure."""
    if isinstance(error, DycokeError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
        return OutOfMemoryError("the device ran out of memory for this request")
    return EngineError("the engine failed on this request")
