"""The figures of the table of models are those of the code."""

import re

import pytest

from dycoke_core.compression.policies import make_policy
from dycoke_core.config import CompressionConfig
from dycoke_core.model.qwen2_5_vl import Qwen25VL
from dycoke_core.model.qwen3_vl import Qwen3VL
from dycoke_core.model.qwen_vl import QwenVL
from dycoke_core.model.temporal_patches import TemporalPatches
from dycoke_core.model_frames import frame_size
from dycoke_core.video import FrameSpec
from tests.docs.documents import ROOT

NUM_FRAMES, NUM_LAYERS = 32, 28


def counts(num_units: int, tokens_per_unit: int) -> str:
    policy = make_policy(CompressionConfig())
    num_visual = policy.count_visual_tokens(num_units, tokens_per_unit)
    num_kept = policy.count_decode_tokens(num_visual, NUM_LAYERS)
    return f"{num_units * tokens_per_unit:,} → {num_visual:,} → {num_kept:,}"


def counts_of_qwen(family: type[QwenVL], height: int, width: int) -> str:
    """By its processor's defaults, at the size in which the service reads frames."""
    patches = TemporalPatches.of_processor(
        # Whose limit of the whole video would say less of the family than of this default.
        family.processor_defaults | {"max_pixels": 25165824},
        limits_whole_video=family.limits_whole_video,
    )
    side = 14 * patches.limits.multiple
    spec = FrameSpec(NUM_FRAMES, frame_size(side, patches.limits, NUM_FRAMES))
    rows, columns = patches.token_grid(*spec.shape(height, width)[1:3])
    return counts(patches.num_units(NUM_FRAMES), rows * columns)


ROWS = {
    "llava_onevision": [counts(NUM_FRAMES, 196)],
    "gemma3": [counts(NUM_FRAMES, 256)],
    "qwen2_5_vl": [counts_of_qwen(Qwen25VL, 720, 1280), counts_of_qwen(Qwen25VL, 720, 720)],
    "qwen3_vl": [counts_of_qwen(Qwen3VL, 720, 1280), counts_of_qwen(Qwen3VL, 720, 720)],
}


@pytest.mark.parametrize("model_type", ROWS)
def test_table_says_what_dycoke_keeps(model_type: str) -> None:
    text = (ROOT / "docs/models.md").read_text()
    key = f"`{model_type}`"
    (row,) = [line for line in text.splitlines() if line.startswith("|") and key in line]
    assert re.findall(r"[\d,]+ → [\d,]+ → \d[\d,]*\d", row) == ROWS[model_type], row
