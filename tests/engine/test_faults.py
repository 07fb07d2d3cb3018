"""What an exception ends: one sequence, or the engine."""

import pytest
import torch

from dycoke_core.engine.faults import has_broken_device, public_error
from dycoke_core.errors import InvalidRequestError


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_a_failed_allocation_ends_a_sequence_and_breaks_nothing(error: Exception) -> None:
    assert public_error(error).code == "out_of_memory"
    assert not has_broken_device(error)


def test_other_cuda_errors_are_the_engines_end() -> None:
    assert has_broken_device(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert has_broken_device(RuntimeError("Triton Error [CUDA]: misaligned address"))
    assert not has_broken_device(RuntimeError("shapes do not match"))
    assert not has_broken_device(ValueError("CUDA error: told by somebody else"))


def test_a_kernel_that_can_never_run_is_the_engines_end() -> None:
    from triton.runtime.errors import OutOfResources

    assert has_broken_device(OutOfResources(300_000, 232_448, "shared memory"))


def test_clients_read_our_own_errors_and_nothing_of_others() -> None:
    ours = InvalidRequestError("frames must be uint8")
    assert public_error(ours) is ours
    assert public_error(ValueError("/secret/place")).code == "engine_error"
    assert "secret" not in public_error(ValueError("/secret/place")).message
