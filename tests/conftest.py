"""What every test may use: a model of the bundled one's shape and an engine on it, in float32."""

import os
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # kernels choose the interpreter when they are imported
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"

from app.process_table import ProcessTable
from dycoke_core.config import EngineConfig
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.loader import load_model
from tests.engine.recording import RecordingEngine
from tests.garbage import collection_paused
from tests.random_checkpoint import build_random_checkpoint

# `make test` installs Triton, `make demo` does not. In CI its absence is an error.
has_kernels = find_spec("triton") is not None or os.environ.get("CI") == "true"
REDIS_FIXTURES = {"redis_server", "own_redis_server"}
# What is in `clients` has an environment of its own: `make clients`.
collect_ignore_glob = ["clients/*", *([] if has_kernels else ["gpu_kernels/*"])]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tests that need a browser run where they are named: `make browser`."""
    is_named = any("tests/browser" in argument for argument in config.args)
    return True if collection_path.name == "browser" and not is_named else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of `integration`, and those of `app` that use a Redis, run several processes or
    connections against real timeouts. On a machine that stalls for seconds one may fail for no
    fault of the service, so each gets a second try, a little later; the summary lists it as a
    rerun. Twice is a failure.
    """
    integration, app = (Path(__file__).parent / name for name in ("integration", "app"))
    for item in items:
        has_redis = not REDIS_FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))
        if integration in item.path.parents or (app in item.path.parents and has_redis):
            item.add_marker(pytest.mark.flaky(reruns=1, reruns_delay=5))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A report of a failure parses the source of all that it shows."""
    with collection_paused():
        return (yield)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers word salad that never ends early: see `tests.random_checkpoint`."""
    directory = tmp_path_factory.mktemp("random") / "dycoke-tiny"
    build_random_checkpoint(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(random_checkpoint: Path) -> LlavaOnevision:
    torch.set_num_threads(1)
    return load_model(random_checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def engine(tiny_model: LlavaOnevision) -> Iterator[RecordingEngine]:
    """An engine that must be empty when the test ends."""
    engine = RecordingEngine(tiny_model, EngineConfig(device="cpu", dtype="float32"))
    yield engine
    while engine.has_work:
        engine.step()
    assert engine.stats().kv_bytes_in_use == 0 and engine.admission.leaked_bytes == 0


@pytest.fixture
def process_table() -> Iterator[ProcessTable]:
    """Of two API processes."""
    table = ProcessTable.create(2)
    yield table
    table.close()
