"""Sizes as configurations of transformers say them."""

import pytest
from transformers import Gemma3TextConfig, Qwen2Config

from dycoke_core.errors import ModelLoadError
from dycoke_core.model.adapter import LayerKind
from dycoke_core.model.geometry import layer_specs, text_geometry


def test_a_model_of_full_attention() -> None:
    config = Qwen2Config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3
    )
    geometry = text_geometry(config)
    assert (geometry.head_size, geometry.num_kv_heads, geometry.num_layers) == (16, 2, 3)
    assert (geometry.num_windowed_layers, geometry.window) == (0, 0)
    assert [spec.window for spec in layer_specs(config)] == [None] * 3


def test_windows_are_those_of_the_layers_that_have_them() -> None:
    sliding, full = LayerKind.SLIDING.value, LayerKind.FULL.value
    config = Gemma3TextConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,  # not hidden_size / heads
        num_hidden_layers=3,
        sliding_window=24,
        layer_types=[sliding, full, sliding],
    )
    geometry = text_geometry(config)
    assert (geometry.head_size, geometry.num_windowed_layers, geometry.window) == (32, 2, 24)
    assert [spec.window for spec in layer_specs(config)] == [24, None, 24]
    assert {spec.head_size for spec in layer_specs(config)} == {32}


def test_a_kind_of_layer_that_is_none_of_ours_is_refused() -> None:
    config = Qwen2Config(num_hidden_layers=2)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelLoadError, match="linear_attention"):
        layer_specs(config)
