"""Which decoders the fused one computes, and how they differ: names, norms and activations.

A form is refused by the first thing about it that the kernels would compute otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers.activations import GELUTanh, SiLUActivation

from dycoke_core.compression.flops import TextGeometry
from dycoke_core.errors import ModelLoadError
from dycoke_core.model.adapter import LayerKind

QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_LINEARS = (*QKV, *GATE_UP, "self_attn.o_proj", "mlp.down_proj")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # others look at positions on the host

Activation = Literal["silu", "gelu_tanh"]
_ACTIVATIONS: Mapping[Activation, tuple[type[nn.Module], ...]] = {
    "silu": (nn.SiLU, SiLUActivation),
    "gelu_tanh": (GELUTanh,),
}


@dataclass(frozen=True, slots=True)
class DecoderForm:
    """
    Args:
        attention_norm, mlp_norm: names of what comes before either; after_attention, after_mlp: of
            what its output goes through before it is added, if anything.
        norm_types: names of classes that compute the same.
        adds_one: whether norms multiply by 1 + weight, in float32, and round once.
        kinds: of layers, each of which rotates in its own way.
    """

    norm_types: tuple[str, ...]
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    after_attention: str | None = None
    after_mlp: str | None = None
    activation: Activation = "silu"
    adds_one: bool = False
    kinds: tuple[LayerKind, ...] = (LayerKind.FULL,)

    @property
    def norms(self) -> tuple[str, ...]:
        names = (self.attention_norm, self.after_attention, self.mlp_norm, self.after_mlp)
        return tuple(name for name in names if name is not None)


# By the class of the decoder.
_FORMS: Mapping[str, DecoderForm] = {
    "Qwen2Model": DecoderForm(("Qwen2RMSNorm",)),
    "Qwen2_5_VLTextModel": DecoderForm(("Qwen2_5_VLRMSNorm", "Qwen2RMSNorm")),
    "Qwen3VLTextModel": DecoderForm(("Qwen3VLTextRMSNorm",)),
    "Gemma3TextModel": DecoderForm(
        ("Gemma3RMSNorm",),
        mlp_norm="pre_feedforward_layernorm",
        after_attention="post_attention_layernorm",
        after_mlp="post_feedforward_layernorm",
        activation="gelu_tanh",
        adds_one=True,
        kinds=(LayerKind.FULL, LayerKind.SLIDING),
    ),
}


def form_of(model: Any, lm_head: nn.Module, geometry: TextGeometry) -> DecoderForm:
    """Raises ModelLoadError: the model has a form that the kernels do not compute."""
    form = _FORMS.get(type(model).__name__)
    if form is None:
        raise _refusal(f"a {type(model).__name__}")
    unknown = sorted(set(getattr(model.config, "layer_types", None) or ()) - set(form.kinds))
    _require(not unknown, f"layers of kind {', '.join(unknown)}")
    rope_types = model.rotary_emb.rope_type
    for rope_type in rope_types.values() if isinstance(rope_types, dict) else [rope_types]:
        _require(rope_type in _STATIC_ROPE, f"rotary embeddings of type {rope_type}")
    _require(type(lm_head) is nn.Linear, f"a head of type {type(lm_head).__name__}")
    _require(len(model.layers) == geometry.num_layers > 0, f"{len(model.layers)} layers")
    for index, layer in enumerate(model.layers):
        _check_layer(layer, index, geometry, form)
    scalings = {layer.self_attn.scaling for layer in model.layers}
    _require(len(scalings) == 1, "layers that scale attention differently")
    heads = HEAD_NORMS if hasattr(model.layers[0].self_attn, "q_norm") else ()
    names = (*form.norms, *heads)
    norms = [model.norm] + [layer.get_submodule(name) for layer in model.layers for name in names]
    types = sorted({type(norm).__name__ for norm in norms} - set(form.norm_types))
    _require(not types, f"norms of type {', '.join(types)}")
    return form


def _check_layer(layer: nn.Module, index: int, geometry: TextGeometry, form: DecoderForm) -> None:
    required = {f"{name}.weight" for name in (*_LINEARS, *form.norms)}
    found = {name for name, _ in layer.named_parameters()}
    head_norms = {f"{name}.weight" for name in HEAD_NORMS}
    optional = {f"{name}.bias" for name in _LINEARS} | head_norms
    _require(required <= found, f"layer {index} without {min(required - found, default='')}")
    extra = found - required - optional
    _require(not extra, f"layer {index} with {min(extra, default='')}")
    _require(len(found & head_norms) != 1, f"layer {index} with a norm of queries or keys alone")
    linears = {name: layer.get_submodule(name) for name in _LINEARS}
    for name, linear in linears.items():
        _require(type(linear) is nn.Linear, f"layer {index} with {name} a {type(linear).__name__}")
    for group in (QKV, GATE_UP):
        num_biases = len(found & {f"{name}.bias" for name in group})
        _require(num_biases in (0, len(group)), f"layer {index} with a bias in some of {group}")
    activation = layer.get_submodule("mlp.act_fn")
    is_known = isinstance(activation, _ACTIVATIONS[form.activation])
    _require(is_known, f"layer {index} with {type(activation).__name__} in its MLP")
    sizes = tuple(linears[name].out_features for name in QKV)
    heads = (geometry.num_heads, geometry.num_kv_heads, geometry.num_kv_heads)
    expected = tuple(number * geometry.head_size for number in heads)
    _require(sizes == expected, f"layer {index} with projections of {sizes}, not {expected}")


def _require(condition: bool, found: str) -> None:
    if not condition:
        raise _refusal(found)


def _refusal(found: str) -> ModelLoadError:
    return ModelLoadError(f"the CUDA backend has no kernels for this model: it has {found}")
