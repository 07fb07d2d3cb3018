"""What an exception during a sequence's work means for the engine, and for the client."""

import torch

from dycoke_core.errors import DycokeError, EngineError, OutOfMemoryError

# From errors that have their own class in only some places: a failed allocation of PyTorch on a
# CPU, of pinned memory, of cuBLAS, and of Triton, which raises what the driver returns.
_NO_MEMORY = (
    "allocate memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "ALLOC_FAILED",
)
_DEVICE_ERRORS = ("CUDA error", "Triton Error [CUDA]", "cuDNN error", "CUBLAS_STATUS")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on the device or the host. Nothing else is broken then."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def has_broken_device(error: Exception) -> bool:
    """Whether every later call would fail too: after most CUDA errors the process is lost, and a
    kernel that does not compile, or asks for more than the device has, will never run."""
    if type(error).__module__.startswith("triton."):
        return True
    is_device = isinstance(error, RuntimeError) and any(t in str(error) for t in _DEVICE_ERRORS)
    return is_device and not is_out_of_memory(error)


def public_error(error: Exception) -> DycokeError:
    """The client-safe error for a failure."""
    if isinstance(error, DycokeError):
        return error
    if is_out_of_memory(error):
        return OutOfMemoryError(
            "the device ran out of memory for this request: ask for fewer frames, or try it again"
        )
    return EngineError(
        "the engine failed on this request, and the worker's log says why: try it again"
    )
