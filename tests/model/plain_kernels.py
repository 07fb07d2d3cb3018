"""The kernels of a decoder layer in plain operations: the reference for the fused ones."""

import torch
from torch import Tensor

from dycoke_core.gpu_kernels.rows import PAGE


class PlainKernels:
    """`dycoke_core.model.fused.LayerKernels` on any device; counts its calls by name."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def add_rmsnorm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        self.calls.append("add_rmsnorm")
        if residual is not None:
            residual.add_(x)
            x = residual
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return _times(weight, normed, x.dtype)

    def norm_add_rmsnorm(
        self, x: Tensor, residual: Tensor, added_weight: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        added = self.add_rmsnorm(x, None, added_weight, eps)
        normed = self.add_rmsnorm(added, residual, weight, eps)
        self.calls[-2:] = ["norm_add_rmsnorm"]
        return normed

    def head_rmsnorm(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, *, num_heads: int
    ) -> None:
        self.calls.append("head_rmsnorm")
        heads = qkv.view(len(qkv), -1, len(q_weight))
        num_kv_heads = (heads.shape[1] - num_heads) // 2
        for part, weight in (
            (heads[:, :num_heads], q_weight),
            (heads[:, num_heads : num_heads + num_kv_heads], k_weight),
        ):
            wide = part.float()
            normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
            part.copy_(_times(weight, normed, qkv.dtype))

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
    ) -> None:
        self.calls.append("rope_store")
        num_kv_heads, head_size = k_pool.shape[1:]
        heads = qkv.view(len(qkv), -1, head_size)
        rotated = heads[:, : num_heads + num_kv_heads]
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        rotated.copy_(rotated * cos[:, None] + turned * sin[:, None])
        rows = write_slots.long() + layer * PAGE
        k_pool[rows] = rotated[:, num_heads:]
        v_pool[rows] = heads[:, num_heads + num_kv_heads :]

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        self.calls.append("silu_mul")
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        self.calls.append("gelu_mul")
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.gelu(gate, approximate="tanh") * up


def _times(weight: Tensor, normed: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 weight in a model of lower precision is multiplied before anything is rounded."""
    if weight.dtype == dtype:
        return weight * normed.to(dtype)
    return (weight * normed).to(dtype)
