"""The labs that the engine's tests run on, one for each backend."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.loader import load_model
from tests.engine import plain_kernels
from tests.engine.lab import Lab
from tests.random_checkpoint import SMALL_SHAPE, build_random_checkpoint

HAS_GPU = torch.cuda.is_available()


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
    # Few rows, for few graphs; little memory, which must be filled with zeros.
    of_cuda = {"max_running_sequences": 8, "kv_cache_bytes": 2**23, "host_cache_bytes": 2**23}
    of_cpu = {"max_running_sequences": 8}
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
    """A backend, and a model for it. On a CPU, "cuda" runs on plain kernels."""
    lab = session_labs[request.param]
    with pytest.MonkeyPatch.context() as patches:
        violations = [] if HAS_GPU else plain_kernels.install(patches)
        yield lab
        lab.check()
        assert not violations


@pytest.fixture
def twin(session_labs: dict[str, Lab]) -> Iterator[Lab]:
    """The CPU's backend on the model of the lab "cuda"."""
    yield session_labs["small cpu"]
    session_labs["small cpu"].check()
