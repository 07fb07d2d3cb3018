"""Decoders that the kernels do not compute, refused by what they have."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers.activations import GELUTanh

from dycoke_core.errors import ModelLoadError
from dycoke_core.model.adapter import LayerKind
from dycoke_core.model.decoder_forms import DecoderForm, form_of
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.loader import load_model
from tests.random_gemma import build_random_gemma3


@pytest.fixture
def decoder(tiny_model: LlavaOnevision) -> Any:
    """One that a test may change."""
    return deepcopy(tiny_model.model.model.language_model)


def form(decoder: Any, model: LlavaOnevision, head: nn.Module | None = None) -> DecoderForm:
    return form_of(decoder, head or model.model.lm_head, model.text_geometry)


def slide(model: Any) -> None:
    model.config.layer_types = [*model.config.layer_types[:-1], "sliding_attention"]


def add_query_norm(model: Any) -> None:
    model.layers[1].self_attn.q_norm = nn.LayerNorm(64)


def exchange_activation(model: Any) -> None:
    model.layers[2].mlp.act_fn = GELUTanh()


def drop_one_bias(model: Any) -> None:
    model.layers[3].self_attn.k_proj.bias = None


def exchange_norm(model: Any) -> None:
    model.norm = nn.RMSNorm(256)


def exchange_linear(model: Any) -> None:
    class Quantized(nn.Linear):
        pass

    model.layers[0].mlp.down_proj = Quantized(512, 256, bias=False)


def scale_by_length(model: Any) -> None:
    model.rotary_emb.rope_type = "dynamic"


def narrow(model: Any) -> None:
    model.layers[0].self_attn.k_proj = nn.Linear(256, 64)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (slide, "layers of kind sliding_attention"),
        (add_query_norm, "layer 1 with self_attn.q_norm.bias"),
        (exchange_activation, "layer 2 with GELUTanh in its MLP"),
        (drop_one_bias, "layer 3 with a bias in some of"),
        (exchange_norm, "norms of type RMSNorm"),
        (exchange_linear, "layer 0 with mlp.down_proj a Quantized"),
        (scale_by_length, "rotary embeddings of type dynamic"),
        (narrow, "layer 0 with projections of"),
    ],
)
def test_a_model_of_another_form_is_refused_by_what_it_has(
    change: Callable[[Any], None], found: str, decoder: Any, tiny_model: LlavaOnevision
) -> None:
    change(decoder)
    with pytest.raises(ModelLoadError, match=f"no kernels for this model: it has {found}"):
        form(decoder, tiny_model)


def test_the_bundled_models_form_is_one_of_those_that_are_known(
    decoder: Any, tiny_model: LlavaOnevision
) -> None:
    found = form(decoder, tiny_model)
    assert found.norms == ("input_layernorm", "post_attention_layernorm")
    assert (found.activation, found.adds_one, found.kinds) == ("silu", False, (LayerKind.FULL,))


def test_gemmas_form_has_a_norm_on_either_side_of_each_part(tmp_path: Path) -> None:
    build_random_gemma3(tmp_path / "gemma")
    model: Any = load_model(tmp_path / "gemma", device="cpu", dtype="float32")
    inner = model.model.model.language_model
    found = form_of(inner, model.model.lm_head, model.text_geometry)
    assert len(found.norms) == 4 and found.adds_one
    assert found.kinds == (LayerKind.FULL, LayerKind.SLIDING)


def test_another_class_is_refused_by_its_name(tiny_model: LlavaOnevision) -> None:
    with pytest.raises(ModelLoadError, match="it has a Sequential"):
        form(nn.Sequential(), tiny_model)


def test_layers_and_head_are_counted_and_looked_at(
    decoder: Any, tiny_model: LlavaOnevision
) -> None:
    with pytest.raises(ModelLoadError, match="a head of type Identity"):
        form(decoder, tiny_model, nn.Identity())
    del decoder.layers[-1]
    with pytest.raises(ModelLoadError, match="it has 5 layers"):
        form(decoder, tiny_model)
