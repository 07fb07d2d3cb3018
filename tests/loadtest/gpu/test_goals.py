"""The figures that a GPU must show, and the counts behind them."""

import pytest
import torch

from loadtest.geometry import GEOMETRY_7B, random_llava_onevision
from loadtest.gpu.goals import BY_KEY, GOALS


def test_a_goal_is_met_on_its_own_side() -> None:
    step, ratio = BY_KEY["decode_b64_dycoke_ms"], BY_KEY["decode_b64_full_over_dycoke"]
    assert step.is_met(6.0) and not step.is_met(6.1)
    assert ratio.is_met(1.8) and not ratio.is_met(1.79)
    assert step.share_of_ideal(7.74) == pytest.approx(0.5)
    assert ratio.share_of_ideal(1.01) == pytest.approx(0.5)
    assert len(BY_KEY) == len(GOALS) == 25


def test_ideals_are_the_counts_at_the_data_sheets_rates() -> None:
    """Those of decode steps: weights once, and each sequence's keys and values."""
    model = random_llava_onevision(GEOMETRY_7B, device="meta", dtype=torch.bfloat16)
    text, text_tokens = model.text_geometry, 60 + 32
    head = text.head_size * (2 * text.num_heads + 2 * text.num_kv_heads)
    layer = text.hidden_size * (head + 3 * text.intermediate_size)
    weights = text.num_layers * layer + text.hidden_size * text.vocab_size
    row = 2 * text.num_layers * text.num_kv_heads * text.head_size
    visual = {"full": 6273, "ttm": 2961, "dycoke": (3 * 2961 + 25 * 0.3 * 2961) / 28}
    for policy, tokens in visual.items():
        ms = 2 * (weights + 64 * row * (tokens + text_tokens)) / 4.8e12 * 1e3
        assert BY_KEY[f"decode_b64_{policy}_ms"].ideal == pytest.approx(ms, abs=0.01)
