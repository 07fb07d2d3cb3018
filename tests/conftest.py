"""What every test may use: the bundled checkpoint and an engine on it in float32."""

from collections.abc import Iterator

import pytest
import torch

from dycoke_core.config import EngineConfig
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.loader import load_model
from dycoke_core.tiny.build import CHECKPOINT
from tests.engine.recording import RecordingEngine


@pytest.fixture(scope="session")
def tiny_model() -> LlavaOnevision:
    torch.set_num_threads(1)
    return load_model(CHECKPOINT, device="cpu", dtype="float32")


@pytest.fixture
def engine(tiny_model: LlavaOnevision) -> Iterator[RecordingEngine]:
    """An engine that must be empty when the test ends."""
    engine = RecordingEngine(tiny_model, EngineConfig(device="cpu", dtype="float32"))
    yield engine
    while engine.has_work:
        engine.step()
    assert engine.stats().kv_bytes_in_use == 0 and engine._admission.leaked_bytes == 0
