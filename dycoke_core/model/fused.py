"""A decoder in ten launches a layer: merged weights, and kernels that do two things at once.

Queries, keys and values come out of one product, and so do the MLP's gate and up. The merged
weights replace the loaded ones, whose parameters become views of them: transformers' own forward
keeps working, and nothing is held twice. Moving or casting the model afterwards would part them.

    norm, qkv, rotate and store, attend (2), out, add and norm, gate and up, activation, down
    and one more where queries and keys have norms of their own

Where what is added goes through a norm of its own first, as in Gemma's, that is in the same launch.
From the second layer on the first norm takes the addition of the layer before. The caller decides
what rows attend to and where keys and values are stored: `run` takes slots.

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

from dycoke_core.compression.flops import TextGeometry
from dycoke_core.model.decoder_forms import GATE_UP, HEAD_NORMS, QKV, DecoderForm, form_of

# Called with a layer and its rotated queries [n, H, E], keys and values [n, G, E], rows of any
# stride, once keys and values are stored; returns [n, H * E].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


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

    def norm_add_rmsnorm(
        self, x: Tensor, residual: Tensor, added_weight: Tensor, weight: Tensor, eps: float
    ) -> Tensor: ...

    def silu_mul(self, gate_up: Tensor) -> Tensor: ...

    def gelu_mul(self, gate_up: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Linear:
    weight: Tensor  # [out, in]
    bias: Tensor | None

    def __call__(self, rows: Tensor) -> Tensor:
        return functional.linear(rows, self.weight, self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class _Norm:
    weight: Tensor  # in float32 where the product is rounded once, as in Gemma's
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    attention_norm: _Norm
    qkv: _Linear
    head_norms: tuple[Tensor, Tensor, float] | None  # of queries and keys, [E] each; epsilon
    out: _Linear
    after_attention: _Norm | None  # of what is added
    mlp_norm: _Norm
    gate_up: _Linear
    down: _Linear
    after_mlp: _Norm | None
    kind: int  # which of the rotations is its own


class FusedDecoder:
    """The layers, the final norm and the head of a language model; no state of any sequence.

    Args:
        language_model: of a form that `dycoke_core.model.decoder_forms` lists. Its weights become
            views of merged ones; a second decoder of the same model shares them.
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
        form = form_of(model, lm_head, geometry)
        self.kernels = _triton_kernels() if kernels is None else kernels
        self._geometry = geometry
        self._rotary: Any = model.rotary_emb
        self.scaling = float(model.layers[0].self_attn.scaling)
        self._activation = form.activation
        self._kinds = form.kinds if len(form.kinds) > 1 else None
        self.embedding: Tensor = model.embed_tokens.weight.detach()  # [vocabulary, D]
        scale = getattr(model.embed_tokens, "embed_scale", None)
        self.embed_scale = 1.0 if scale is None else float(scale.to(self.embedding.dtype))
        # Not as inference tensors: the parameters stay usable outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self.layers = [_merged(layer, form) for layer in model.layers]
            self._final_norm = _norm(model.norm, form)
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
            cos, sin: of `rotary`.
            write_slots: int32 [n], where the tokens' keys and values go in the pool.
            keys, values: the pool, [R, G, E] each.
            attend: called once per layer.
            layer_adds: [layers, rows, D], added to the first rows after each of the first layers.

        Returns:
            [n, D] after the final norm.
        """
        kernels, geometry = self.kernels, self._geometry
        num_heads = geometry.num_heads
        end_of_keys = num_heads + geometry.num_kv_heads
        activate = kernels.silu_mul if self._activation == "silu" else kernels.gelu_mul
        first_norm = self.layers[0].attention_norm
        normed = kernels.add_rmsnorm(hidden, None, first_norm.weight, first_norm.eps)
        next_norms = [layer.attention_norm for layer in self.layers[1:]] + [self._final_norm]
        for index, (layer, next_norm) in enumerate(zip(self.layers, next_norms, strict=True)):
            qkv = layer.qkv(normed)
            if layer.head_norms is not None:
                kernels.head_rmsnorm(qkv, *layer.head_norms, num_heads=num_heads)
            rotation = (cos, sin) if cos.dim() == 2 else (cos[layer.kind], sin[layer.kind])
            kernels.rope_store(
                qkv, *rotation, write_slots, keys, values, layer=index, num_heads=num_heads
            )
            heads = qkv.view(len(qkv), -1, geometry.head_size)
            q, k, v = heads[:, :num_heads], heads[:, num_heads:end_of_keys], heads[:, end_of_keys:]
            attention_output = layer.out(attend(index, q, k, v))
            after, norm = layer.after_attention, layer.mlp_norm
            normed = _add_norm(kernels, attention_output, hidden, after, norm)
            mlp_output = layer.down(activate(layer.gate_up(normed)))
            if layer_adds is not None and index < len(layer_adds):
                mlp_output[: layer_adds.shape[1]] += layer_adds[index]
            normed = _add_norm(kernels, mlp_output, hidden, layer.after_mlp, next_norm)
        return normed

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin in the model's dtype, by the model's own module: [n, E], or [kinds, n, E]
        where layers of several kinds rotate each in its own way.

        Args:
            positions: int64 [axes, n]; one axis, or those that the model's rotary embedding joins.
        """
        if self._kinds is not None:
            parts = [self._rotary(self.embedding, positions, kind) for kind in self._kinds]
            return torch.cat([cos for cos, _ in parts]), torch.cat([sin for _, sin in parts])
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


def _add_norm(
    kernels: LayerKernels, x: Tensor, residual: Tensor, added: _Norm | None, norm: _Norm
) -> Tensor:
    if added is None:
        return kernels.add_rmsnorm(x, residual, norm.weight, norm.eps)
    return kernels.norm_add_rmsnorm(x, residual, added.weight, norm.weight, norm.eps)


def _merged(layer: Any, form: DecoderForm) -> _Layer:
    def linears(names: Sequence[str]) -> list[nn.Linear]:
        return [_linear_at(layer, name) for name in names]

    def norm(name: str) -> _Norm:
        return _norm(layer.get_submodule(name), form)

    kind = getattr(layer.self_attn, "layer_type", None)
    return _Layer(
        attention_norm=norm(form.attention_norm),
        qkv=_merge(linears(QKV)),
        head_norms=_head_norms(layer, form),
        out=_linear(_linear_at(layer, "self_attn.o_proj")),
        after_attention=norm(form.after_attention) if form.after_attention else None,
        mlp_norm=norm(form.mlp_norm),
        gate_up=_merge(linears(GATE_UP)),
        down=_linear(_linear_at(layer, "mlp.down_proj")),
        after_mlp=norm(form.after_mlp) if form.after_mlp else None,
        kind=form.kinds.index(kind) if kind in form.kinds else 0,
    )


def _head_norms(layer: Any, form: DecoderForm) -> tuple[Tensor, Tensor, float] | None:
    if not hasattr(layer.self_attn, "q_norm"):
        return None
    queries, keys = (_norm(layer.get_submodule(name), form) for name in HEAD_NORMS)
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


def _norm(norm: Any, form: DecoderForm) -> _Norm:
    weight = norm.weight.detach()
    if form.adds_one:
        return _Norm(1.0 + weight.float(), float(norm.eps))
    return _Norm(weight, float(norm.variance_epsilon))
