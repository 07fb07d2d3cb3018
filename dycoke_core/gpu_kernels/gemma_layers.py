"""What Gemma's decoder layers do otherwise than Qwen's, each in one launch.

Values are rounded where transformers' Gemma3 rounds them: norms multiply by 1 + weight in float32
and round once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dycoke_core.gpu_kernels.launch import check_tensors, launch, require

MAX_HIDDEN = 8192  # D: one program holds a row in registers
_TILE = 1024


def norm_add_rmsnorm(
    x: Tensor, residual: Tensor, added_weight: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """Adds x's RMS norm to the residual, in place, and returns the sum's RMS norm.

    One program per row. Reads and writes each row once: 4 * D elements.

    Args:
        x: [n, D], rows of any stride.
        residual: [n, D].
        added_weight, weight: float32 [D], 1 + what the model stores, of x's norm and of the sum's.

    Returns:
        [n, D] in x's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Source: transformers' Gemma3RMSNorm and Gemma3DecoderLayer.
    """
    num_rows, hidden = x.shape
    require(hidden <= MAX_HIDDEN, f"D must be at most {MAX_HIDDEN}")
    require(x.stride(1) == 1, "a row of x must be contiguous")
    require(residual.shape == x.shape, "residual must be of x's shape")
    require(added_weight.shape == weight.shape == (hidden,), "weights must be [D]")
    check_tensors(x.dtype, residual=residual)
    check_tensors(torch.float32, added_weight=added_weight, weight=weight)
    normed = torch.empty((num_rows, hidden), dtype=x.dtype, device=x.device)
    tile = triton.next_power_of_2(hidden)
    launch(
        norm_add_rmsnorm_kernel,
        (num_rows,),
        x,
        residual,
        added_weight,
        weight,
        normed,
        eps,
        x.stride(0),
        D=hidden,
        TILE=tile,
        num_warps=max(1, min(16, tile // 512)),
    )
    return normed


def gelu_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, by the approximation with tanh. Reads 2 * I elements per row and writes I.

    Args:
        gate_up: [n, 2 * I], contiguous.

    Returns:
        [n, I].

    Raises:
        ValueError: the shape does not fit.

    Source: transformers' Gemma3MLP with gelu_pytorch_tanh.
    """
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    require(gate_up.shape[1] == 2 * width, "gate_up must be [n, 2I]")
    require(gate_up.is_contiguous(), "gate_up must be contiguous")
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_rows, triton.cdiv(width, _TILE))
    launch(gelu_mul_kernel, grid, gate_up, out, WIDTH=width, TILE=_TILE, num_warps=4)
    return out


@triton.jit
def norm_add_rmsnorm_kernel(
    x,
    residual,
    added_weight,
    weight,
    normed,
    eps,
    x_stride,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, TILE)
    dtype = normed.dtype.element_ty
    added = tl.load(x + row * x_stride + d, mask=d < D, other=0.0).to(tl.float32)
    added *= tl.rsqrt(tl.sum(added * added) / D + eps)
    added *= tl.load(added_weight + d, mask=d < D, other=0.0)
    before = tl.load(residual + row * D + d, mask=d < D, other=0.0)
    hidden = (before.to(tl.float32) + added.to(dtype).to(tl.float32)).to(dtype)
    tl.store(residual + row * D + d, hidden, mask=d < D)
    hidden = hidden.to(tl.float32)
    hidden *= tl.rsqrt(tl.sum(hidden * hidden) / D + eps)
    hidden *= tl.load(weight + d, mask=d < D, other=0.0)
    tl.store(normed + row * D + d, hidden.to(dtype), mask=d < D)


@triton.jit
def gelu_mul_kernel(gate_up, out, WIDTH: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    dtype = out.dtype.element_ty
    gate = tl.load(gate_up + row * (2 * WIDTH) + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + i, mask=i < WIDTH, other=0.0)
    # 1 + tanh(y) is 2 / (1 + exp(-2y)): sqrt(8 / pi) is 2 * sqrt(2 / pi).
    twice = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    gelu = (gate / (1 + tl.exp(tl.minimum(-twice, 88.0)))).to(dtype)  # exp(89) is infinite
    tl.store(out + row * WIDTH + i, gelu * up, mask=i < WIDTH)
