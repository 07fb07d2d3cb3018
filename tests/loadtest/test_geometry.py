"""Models of real shapes with random weights."""

from pathlib import Path

import torch

from dycoke_core.model.loader import load_model
from loadtest.geometry import GEOMETRY_7B, random_llava_onevision, write_medium_checkpoint


def test_medium_model_has_a_real_models_tokens_per_frame(tmp_path: Path) -> None:
    write_medium_checkpoint(tmp_path / "medium")
    model = load_model(tmp_path / "medium", device="cpu", dtype="float32")
    assert model.tokens_per_frame == 196


def test_a_model_is_made_on_its_device_alone() -> None:
    model = random_llava_onevision(GEOMETRY_7B, device="meta", dtype=torch.bfloat16).model
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert 8.0e9 < sum(parameter.numel() for parameter in model.parameters()) < 8.1e9
