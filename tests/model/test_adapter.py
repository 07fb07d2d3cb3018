"""Where a layout puts visual tokens, and models with layers that no backend runs."""

from types import SimpleNamespace

import pytest

from dycoke_core.config import EngineConfig
from dycoke_core.engine.backends import make_backend
from dycoke_core.errors import ModelLoadError
from dycoke_core.model.adapter import (
    Clip,
    LayerKind,
    LayerSpec,
    Newline,
    PromptLayout,
    Text,
    Units,
)
from dycoke_core.model.geometry import layer_specs
from dycoke_core.model.llava_onevision import LlavaOnevision

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def layout(*prefix: Text | Units | Newline) -> PromptLayout:
    return PromptLayout(Clip(3, 8, 8), prefix, question_ids=(9, 9), num_units=3, tokens_per_unit=4)


def test_units_that_follow_each_other_make_one_run() -> None:
    one_run = layout(Text((1, 2)), Units(range(3)), Newline())
    assert one_run.num_prefix_text == 3
    assert one_run.visual_runs((4, 1, 2)) == (range(2, 9),)


def test_text_between_units_parts_their_runs() -> None:
    runs = layout(
        Text((1, 2)),
        Units(range(1)),
        Text((3,)),
        Units(range(1, 2)),
        Text((4,)),
        Units(range(2, 3)),
    )
    assert runs.num_prefix_text == 4
    assert runs.visual_runs((4, 1, 2)) == (range(2, 6), range(7, 8), range(9, 11))


def test_a_unit_of_which_nothing_is_kept_leaves_its_text_behind() -> None:
    runs = layout(Text((1,)), Units(range(1)), Text((3,)), Units(range(1, 3)))
    assert runs.visual_runs((0, 0, 2)) == (range(2, 4),)
    assert runs.visual_runs((0, 0, 0)) == ()


def test_layers_are_those_of_the_configuration() -> None:
    plain = layer_specs(SimpleNamespace(**SIZES))
    assert plain == (LayerSpec(LayerKind.FULL, num_kv_heads=2, head_size=16),) * 3
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    mixed = layer_specs(SimpleNamespace(**SIZES, layer_types=kinds, sliding_window=512, head_dim=8))
    assert [layer.kind for layer in mixed] == kinds
    assert [layer.window for layer in mixed] == [512, 512, None]
    assert {layer.head_size for layer in mixed} == {8}


def test_a_kind_of_layer_that_nobody_knows_is_refused() -> None:
    kinds = ["linear_attention", "full_attention", "full_attention"]
    with pytest.raises(ModelLoadError, match="'linear_attention', which is not supported"):
        layer_specs(SimpleNamespace(**SIZES, layer_types=kinds))


def test_a_model_whose_layers_no_backend_runs_is_refused_at_start(
    tiny_model: LlavaOnevision, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(backend="cpu")
    full = tiny_model.layers[0]
    near, far = (
        LayerSpec(LayerKind.SLIDING, full.num_kv_heads, full.head_size, window=size)
        for size in (16, 32)
    )
    wide = LayerSpec(LayerKind.FULL, full.num_kv_heads, 2 * full.head_size)
    for layers, message in (
        ((near, far), "windows of different sizes"),
        ((full, wide), "keys differ in size"),
    ):
        monkeypatch.setattr(tiny_model, "layers", layers)
        with pytest.raises(ModelLoadError, match=message):
            make_backend("cpu", tiny_model, config, config.batching("cpu"))
