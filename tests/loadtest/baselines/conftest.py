"""The bundled model's shape in transformers, whose eager attention shows its weights."""

from pathlib import Path

import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration


@pytest.fixture(scope="module")
def eager(random_checkpoint: Path) -> LlavaOnevisionForConditionalGeneration:
    return LlavaOnevisionForConditionalGeneration.from_pretrained(
        random_checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
