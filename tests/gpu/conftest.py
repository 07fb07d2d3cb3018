"""Float32 that is float32, and the fixtures of `tests/conftest.py`, which a bare image's run of
this folder does not read: `pytest -c tests/gpu/pytest.ini` begins at this folder."""

from collections.abc import Iterator

import pytest
import torch

from tests.conftest import engine, random_checkpoint, tiny_model

__all__ = ["engine", "random_checkpoint", "tiny_model"]


@pytest.fixture(autouse=True, scope="session")
def exact_float32() -> Iterator[None]:
    """Neither matrix products nor convolutions (SigLIP's patches) round float32 to TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before
