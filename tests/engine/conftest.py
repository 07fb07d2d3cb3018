"""The labs that the engine's tests run on, one for each backend."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.loader import load_model
from tests.engine.lab import Lab
from tests.random_checkpoint import SMALL_SHAPE, build_random_checkpoint

HAS_GPU = torch.cuda.is_available()


def need_triton() -> None:
    """Skips a test of the CUDA backend where Triton is not installed; in CI, fails it."""
    if find_spec("triton") is None:
        message = "the CUDA backend needs Triton (`make test` installs it)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For slow kernels: four layers, 9 tokens per frame."""
    directory = tmp_path_factory.mktemp("random") / "small"
    build_random_checkpoint(directory, shape=SMALL_SHAPE)
    return directory


@pytest.fixture(scope="session")
def small_model(small_checkpoint: Path) -> LlavaOnevision:
    torch.set_num_threads(1)
    return load_model(small_checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def session_labs(
    random_checkpoint: Path,
    tiny_model: LlavaOnevision,
    small_checkpoint: Path,
    small_model: LlavaOnevision,
) -> Iterator[dict[str, Lab]]:
    """By name; `small cpu` is the CPU's backend on the other's model, to compare the two."""
    on_device = small_model
    if HAS_GPU:
        torch.backends.cudnn.allow_tf32 = False
        on_device = load_model(small_checkpoint, device="cuda", dtype="float32")
    # How much of the vision tower runs in a step depends on no clock here.
    of_cpu = {"max_running_sequences": 8, "vision_slice_layers": 1}
    # Little memory, which must be filled with zeros.
    of_cuda = of_cpu | {"kv_cache_bytes": 2**23, "host_cache_bytes": 2**23}
    labs = {
        "cpu": Lab("cpu", random_checkpoint, tiny_model, tiny_model, of_cpu),
        "small cpu": Lab("cpu", small_checkpoint, small_model, small_model, of_cpu),
        "cuda": Lab("cuda", small_checkpoint, on_device, small_model, of_cuda),
    }
    yield labs
    for lab in labs.values():
        assert lab.num_steps_skipped <= 0.01 * lab.num_steps_compared


@pytest.fixture(params=["cpu", "cuda"])
def lab(request: pytest.FixtureRequest, session_labs: dict[str, Lab]) -> Iterator[Lab]:
    """A backend, and a model for it. Without a GPU, "cuda" runs on plain kernels."""
    lab = session_labs[request.param]
    if lab.backend == "cuda":
        need_triton()
    has_kernels = lab.backend == "cpu" or HAS_GPU
    with nullcontext([]) if has_kernels else installed_plain_kernels() as violations:
        yield lab
        lab.check()
        assert not violations


@contextmanager
def installed_plain_kernels() -> Iterator[list[AssertionError]]:
    from tests.engine import plain_kernels

    with pytest.MonkeyPatch.context() as patches:
        yield plain_kernels.install(patches)


@pytest.fixture
def interpreted_lab(session_labs: dict[str, Lab]) -> Iterator[Lab]:
    """The lab "cuda" on the kernels themselves: without a GPU, half a second for a decode step."""
    need_triton()
    yield session_labs["cuda"]
    session_labs["cuda"].check()


@pytest.fixture
def twin(session_labs: dict[str, Lab]) -> Iterator[Lab]:
    """The CPU's backend on the model of the lab "cuda"."""
    yield session_labs["small cpu"]
    session_labs["small cpu"].check()
