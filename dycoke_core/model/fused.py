"""Qwen2's decoder in ten launches a layer: merged weights, and kernels that do two things at once.

Queries, keys and values come out of one product, and so do the MLP's gate and up. The merged
weights replace the loaded ones, whose parameters become views of them: transformers' own forward
keeps working, and nothing is held twice. Moving or casting the model afterwards would part them.

    norm, qkv, rotate and store, attend (2), out, add and norm, gate and up, silu * up, down
    and one more where queries and keys have norms of their own

From the second layer on the first norm takes the addition of the layer before. What rows attend to
is the caller's business, and so is where keys and values are stored: `run` is handed slots.

What is not covered: layers of other forms than those checked here, which are refused; quantized
weights; sharding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import SiLUActivation

from dycoke_core.compression.flops import TextGeometry
from dycoke_core.errors import ModelLoadError

# Called with a layer and its rotated queries [n, H, E], keys and values [n, G, E], rows of any
# stride, once keys and values are stored; returns [n, H * E].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_LINEARS = (*_QKV, *_GATE_UP, "self_attn.o_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
# Decoders of this form, and their norms: all compute the same.
_DECODERS = ("Qwen2Model", "Qwen2_5_VLTextModel", "Qwen3VLTextModel")
_RMS_NORMS = {"Qwen2RMSNorm", "Qwen2_5_VLRMSNorm", "Qwen3VLTextRMSNorm"}
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # others look at positions on the host


class LayerKernels(Protocol):
    """`dycoke_core.gpu_kernels.layers`, or the same in plain operations."""

    def add_rmsnorm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> Tensor: ...

    def head_rmsnorm(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, *, num_heads: int
    ) -> None: ...

    def rope_store(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        write_slots: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        *,
        layer: int,
        num_heads: int,
    ) -> None: ...

    def silu_mul(self, gate_up: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Linear:
    weight: Tensor  # [out, in]
    bias: Tensor | None

    def __call__(self, rows: Tensor) -> Tensor:
        return functional.linear(rows, self.weight, self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class _Norm:
    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    attention_norm: _Norm
    qkv: _Linear
    head_norms: tuple[Tensor, Tensor, float] | None  # of queries and keys, [E] each; epsilon
    out: _Linear
    mlp_norm: _Norm
    gate_up: _Linear
    down: _Linear


class FusedDecoder:
    """The layers, the final norm and the head of a language model; no state of any sequence.

    Args:
        language_model: transformers' Qwen2Model, or one of its form. Its weights become views of
            merged ones; a second decoder of the same model shares them.
        lm_head: its language head.
        kernels: None takes the Triton kernels.

    Raises:
        ModelLoadError: the model has a form that these kernels do not compute.
    """

    def __init__(
        self,
        language_model: nn.Module,
        lm_head: nn.Module,
        geometry: TextGeometry,
        kernels: LayerKernels | None = None,
    ) -> None:
        model: Any = language_model
        _check_model(model, lm_head, geometry)
        self._kernels = _triton_kernels() if kernels is None else kernels
        self._geometry = geometry
        self._rotary: Any = model.rotary_emb
        self.scaling = float(model.layers[0].self_attn.scaling)
        self.embedding: Tensor = model.embed_tokens.weight.detach()  # [vocabulary, D]
        # Not as inference tensors: the parameters stay usable outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self._layers = [_merged(layer) for layer in model.layers]
            self._final_norm = _norm(model.norm)
            self._head = _linear(lm_head)

    def run(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        write_slots: Tensor,
        keys: Tensor,
        values: Tensor,
        attend: Attend,
        *,
        layer_adds: Tensor | None = None,
    ) -> Tensor:
        """Runs all layers over new tokens.

        Args:
            hidden: [n, D] embedded tokens, contiguous; overwritten.
            cos, sin: [n, E], of `rotary`.
            write_slots: int32 [n], where the tokens' keys and values go in the pool.
            keys, values: the pool, [R, G, E] each.
            attend: called once per layer.
            layer_adds: [layers, rows, D], added to the first rows behind each of the first layers.

        Returns:
            [n, D] after the final norm.
        """
        kernels, geometry = self._kernels, self._geometry
        num_heads = geometry.num_heads
        end_of_keys = num_heads + geometry.num_kv_heads
        normed = _add_norm(kernels, hidden, None, self._layers[0].attention_norm)
        next_norms = [layer.attention_norm for layer in self._layers[1:]] + [self._final_norm]
        for index, (layer, next_norm) in enumerate(zip(self._layers, next_norms, strict=True)):
            qkv = layer.qkv(normed)
            if layer.head_norms is not None:
                kernels.head_rmsnorm(qkv, *layer.head_norms, num_heads=num_heads)
            kernels.rope_store(
                qkv, cos, sin, write_slots, keys, values, layer=index, num_heads=num_heads
            )
            heads = qkv.view(len(qkv), -1, geometry.head_size)
            q, k, v = heads[:, :num_heads], heads[:, num_heads:end_of_keys], heads[:, end_of_keys:]
            attention_output = layer.out(attend(index, q, k, v))
            normed = _add_norm(kernels, attention_output, hidden, layer.mlp_norm)
            mlp_output = layer.down(kernels.silu_mul(layer.gate_up(normed)))
            if layer_adds is not None and index < len(layer_adds):
                mlp_output[: layer_adds.shape[1]] += layer_adds[index]
            normed = _add_norm(kernels, mlp_output, hidden, next_norm)
        return normed

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [n, E] in the model's dtype, by the model's own module.

        Args:
            positions: int64 [axes, n]; one axis, or those that the model's rotary embedding joins.
        """
        # transformers takes [batch, n], or [axes, batch, n] where there are several.
        ids = positions if len(positions) == 1 else positions[:, None]
        cos, sin = self._rotary(self.embedding, position_ids=ids)
        shape = (positions.shape[1], self._geometry.head_size)
        return cos.reshape(shape), sin.reshape(shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] → [n, vocabulary] in the model's dtype."""
        return self._head(hidden)


def _triton_kernels() -> LayerKernels:
    from dycoke_core.gpu_kernels import layers  # needs Triton, which only CUDA builds bring along

    return layers


def _add_norm(kernels: LayerKernels, x: Tensor, residual: Tensor | None, norm: _Norm) -> Tensor:
    return kernels.add_rmsnorm(x, residual, norm.weight, norm.eps)


def _merged(layer: nn.Module) -> _Layer:
    def linears(names: Sequence[str]) -> list[nn.Linear]:
        return [_linear_at(layer, name) for name in names]

    return _Layer(
        attention_norm=_norm(layer.get_submodule("input_layernorm")),
        qkv=_merge(linears(_QKV)),
        head_norms=_head_norms(layer),
        out=_linear(_linear_at(layer, "self_attn.o_proj")),
        mlp_norm=_norm(layer.get_submodule("post_attention_layernorm")),
        gate_up=_merge(linears(_GATE_UP)),
        down=_linear(_linear_at(layer, "mlp.down_proj")),
    )


def _head_norms(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    if not hasattr(layer.self_attn, "q_norm"):
        return None
    queries, keys = _norm(layer.self_attn.q_norm), _norm(layer.self_attn.k_norm)
    return queries.weight, keys.weight, queries.eps


def _linear_at(layer: nn.Module, name: str) -> nn.Linear:
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear), "checked before"
    return linear


def _merge(linears: list[nn.Linear]) -> _Linear:
    weight = _merge_parameters([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return _Linear(weight, _merge_parameters(biases) if biases else None)


def _merge_parameters(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor, of which the parameters become views along their first dimension."""
    if _are_merged(parameters):
        first = parameters[0].detach()
        size = (sum(len(parameter) for parameter in parameters), *first.shape[1:])
        return first.as_strided(size, first.stride())
    merged = torch.cat([parameter.detach() for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = merged[start : start + len(parameter)]
        start += len(parameter)
    return merged


def _are_merged(parameters: Sequence[Tensor]) -> bool:
    """Whether each one begins where the one before ends, in the same memory."""
    if len({parameter.untyped_storage().data_ptr() for parameter in parameters}) > 1:
        return False
    return all(parameter.is_contiguous() for parameter in parameters) and all(
        before.storage_offset() + before.numel() == after.storage_offset()
        for before, after in pairwise(parameters)
    )


def _linear(linear: Any) -> _Linear:
    return _Linear(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def _norm(norm: Any) -> _Norm:
    return _Norm(norm.weight.detach(), float(norm.variance_epsilon))


def _check_model(model: Any, lm_head: nn.Module, geometry: TextGeometry) -> None:
    _require(type(model).__name__ in _DECODERS, f"a {type(model).__name__}")
    kinds = sorted(set(getattr(model.config, "layer_types", ())) - {"full_attention"})
    _require(not kinds, f"layers of kind {', '.join(kinds)}")
    rope_type = model.rotary_emb.rope_type
    _require(rope_type in _STATIC_ROPE, f"rotary embeddings of type {rope_type}")
    _require(type(lm_head) is nn.Linear, f"a head of type {type(lm_head).__name__}")
    _require(len(model.layers) == geometry.num_layers > 0, f"{len(model.layers)} layers")
    for index, layer in enumerate(model.layers):
        _check_layer(layer, index, geometry)
    scalings = {layer.self_attn.scaling for layer in model.layers}
    _require(len(scalings) == 1, "layers that scale attention differently")
    names = (*_NORMS, *(_HEAD_NORMS if hasattr(model.layers[0].self_attn, "q_norm") else ()))
    norms = [model.norm] + [layer.get_submodule(name) for layer in model.layers for name in names]
    types = sorted({type(norm).__name__ for norm in norms} - _RMS_NORMS)
    _require(not types, f"norms of type {', '.join(types)}")


def _check_layer(layer: nn.Module, index: int, geometry: TextGeometry) -> None:
    required = {f"{name}.weight" for name in (*_LINEARS, *_NORMS)}
    found = {name for name, _ in layer.named_parameters()}
    head_norms = {f"{name}.weight" for name in _HEAD_NORMS}
    optional = {f"{name}.bias" for name in _LINEARS} | head_norms
    _require(required <= found, f"layer {index} without {min(required - found, default='')}")
    extra = found - required - optional
    _require(not extra, f"layer {index} with {min(extra, default='')}")
    _require(len(found & head_norms) != 1, f"layer {index} with a norm of queries or keys alone")
    linears = {name: layer.get_submodule(name) for name in _LINEARS}
    for name, linear in linears.items():
        _require(type(linear) is nn.Linear, f"layer {index} with {name} a {type(linear).__name__}")
    for group in (_QKV, _GATE_UP):
        num_biases = len(found & {f"{name}.bias" for name in group})
        _require(num_biases in (0, len(group)), f"layer {index} with a bias in some of {group}")
    activation = layer.get_submodule("mlp.act_fn")
    is_silu = isinstance(activation, nn.SiLU | SiLUActivation)
    _require(is_silu, f"layer {index} with {type(activation).__name__} in its MLP")
    sizes = tuple(linears[name].out_features for name in _QKV)
    heads = (geometry.num_heads, geometry.num_kv_heads, geometry.num_kv_heads)
    expected = tuple(number * geometry.head_size for number in heads)
    _require(sizes == expected, f"layer {index} with projections of {sizes}, not {expected}")


def _require(condition: bool, found: str) -> None:
    if not condition:
        raise ModelLoadError(f"the CUDA backend has no kernels for this model: it has {found}")
