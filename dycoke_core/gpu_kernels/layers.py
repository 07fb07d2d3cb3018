"""What a decoder layer does besides matrix products and attention, each in one launch.

Values are rounded where transformers' Qwen2 rounds them: additions, products and norms are in
float32, their results in the model's dtype. A norm whose weight is in float32 in a model of lower
precision multiplies by it before it rounds, as Gemma's do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dycoke_core.gpu_kernels.columns import PAGE, ROW_COLUMNS, SEAT, TOKEN_ID
from dycoke_core.gpu_kernels.gemma_layers import gelu_mul as gelu_mul
from dycoke_core.gpu_kernels.gemma_layers import norm_add_rmsnorm as norm_add_rmsnorm
from dycoke_core.gpu_kernels.launch import check_rows, check_tensors, launch, require

MAX_HIDDEN = 8192  # D: one program holds a row in registers
_TILE = 1024


def add_rmsnorm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Adds x to the residual, in place, and returns the sum's RMS norm times the weight.

    One program per row. Reads and writes each row once: 4 * D elements, 2 * D without a residual.

    Args:
        x: [n, D], rows of any stride.
        residual: [n, D], becomes residual + x; None: x already is the sum and is not changed.
        weight: [D], in x's dtype or in float32.

    Returns:
        [n, D] in x's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Source: transformers' Qwen2RMSNorm and Qwen2DecoderLayer.
    """
    num_rows, hidden = x.shape
    require(hidden <= MAX_HIDDEN, f"D must be at most {MAX_HIDDEN}")
    require(x.stride(1) == 1, "a row of x must be contiguous")
    require(weight.shape == (hidden,), "weight must be [D]")
    check_norm_weights(x.dtype, weight=weight)
    if residual is not None:
        require(residual.shape == x.shape, "residual must be of x's shape")
        check_tensors(x.dtype, residual=residual)
    normed = torch.empty((num_rows, hidden), dtype=x.dtype, device=x.device)
    tile = triton.next_power_of_2(hidden)
    launch(
        add_rmsnorm_kernel,
        (num_rows,),
        x,
        x if residual is None else residual,
        weight,
        normed,
        eps,
        x.stride(0),
        HAS_RESIDUAL=residual is not None,
        ROUNDS_FIRST=weight.dtype == x.dtype,
        D=hidden,
        TILE=tile,
        num_warps=max(1, min(16, tile // 512)),
    )
    return normed


def rope_store(
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
    """Rotates queries and keys in place and stores the keys and values at their slots.

    One program per row and key/value head. Reads a row once, writes all of it except the values
    once, and 2 * G * E elements into the pools.

    Args:
        qkv: [n, (H + 2 * G) * E]: query heads, key heads, value heads.
        cos, sin: [n, E] in the model's dtype, the same for both halves of a head.
        write_slots: int32 [n], of any stride; no slot twice, except the trash page's.
        k_pool, v_pool: [R, G, E].
        num_heads: H.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Source: transformers' apply_rotary_pos_emb.
    """
    num_rows = qkv.shape[0]
    num_kv_heads, head_size = k_pool.shape[1:]
    require(qkv.shape[1] == (num_heads + 2 * num_kv_heads) * head_size, "qkv must be [n, H+2G, E]")
    require(num_heads % num_kv_heads == 0, "H must be a multiple of G")
    require(qkv.stride(1) == 1, "a row of qkv must be contiguous")
    require(cos.shape == sin.shape == (num_rows, head_size), "cos and sin must be [n, E]")
    require(write_slots.shape == (num_rows,), "write_slots must be [n]")
    require(write_slots.dtype == torch.int32, "write_slots must be int32")
    require(k_pool.shape == v_pool.shape, "pools must be of one shape")
    check_tensors(qkv.dtype, cos=cos, sin=sin, k_pool=k_pool, v_pool=v_pool)
    group = num_heads // num_kv_heads
    tile_heads = triton.next_power_of_2(group + 1)
    launch(
        rope_store_kernel,
        (num_rows, num_kv_heads),
        qkv,
        cos,
        sin,
        write_slots,
        k_pool,
        v_pool,
        layer,
        qkv.stride(0),
        write_slots.stride(0),
        G=num_kv_heads,
        R=group,
        E=head_size,
        HEADS=tile_heads,
        # Eight pairs per thread: with fewer, two warps would share pairs, and one would read what
        # the other has already rotated.
        num_warps=max(1, tile_heads * head_size // 512),
    )


def head_rmsnorm(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, *, num_heads: int
) -> None:
    """RMS norm of each query and key head, in place, times the weight of queries or of keys.

    One program per row and head. Reads and writes (H + G) * E elements a row.

    Args:
        qkv: [n, (H + 2 * G) * E]: query heads, key heads, value heads.
        q_weight, k_weight: [E], in qkv's dtype or in float32.
        num_heads: H.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Source: transformers' Qwen3VLTextRMSNorm, by head.
    """
    (num_rows, width), (head_size,) = qkv.shape, q_weight.shape
    num_kv_heads = (width // head_size - num_heads) // 2
    require(width == (num_heads + 2 * num_kv_heads) * head_size, "qkv must be [n, H+2G, E]")
    require(num_kv_heads > 0, "qkv must have key heads")
    require(qkv.stride(1) == 1, "a row of qkv must be contiguous")
    require(k_weight.shape == q_weight.shape, "weights must be [E]")
    check_norm_weights(qkv.dtype, q_weight=q_weight, k_weight=k_weight)
    launch(
        head_rmsnorm_kernel,
        (num_rows, num_heads + num_kv_heads),
        qkv,
        q_weight,
        k_weight,
        eps,
        qkv.stride(0),
        H=num_heads,
        E=head_size,
        TILE=triton.next_power_of_2(head_size),
        ROUNDS_FIRST=q_weight.dtype == qkv.dtype,
        num_warps=1,
    )


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. Reads 2 * I elements per row and writes I.

    Args:
        gate_up: [n, 2 * I], contiguous.

    Returns:
        [n, I].

    Raises:
        ValueError: the shape does not fit.

    Source: transformers' Qwen2MLP.
    """
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    require(gate_up.shape[1] == 2 * width, "gate_up must be [n, 2I]")
    require(gate_up.is_contiguous(), "gate_up must be contiguous")
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_rows, triton.cdiv(width, _TILE))
    launch(silu_mul_kernel, grid, gate_up, out, WIDTH=width, TILE=_TILE, num_warps=4)
    return out


def embed(rows: Tensor, last_ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """Each row's input: the embedding of its TOKEN_ID, or of the id last sampled for its seat.

    Args:
        rows: int32 [n, ROW_COLUMNS].
        last_ids: int32 [seats].
        table: [vocabulary, D].
        scale: multiplies what is read.

    Returns:
        [n, D]; zeros where an id is outside the table.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    num_rows, (num_ids, hidden) = rows.shape[0], table.shape
    check_rows(rows, num_rows)
    check_tensors(table.dtype, table=table)
    check_tensors(torch.int32, last_ids=last_ids)
    out = torch.empty((num_rows, hidden), dtype=table.dtype, device=table.device)
    grid = (num_rows, triton.cdiv(hidden, _TILE))
    args = (rows, last_ids, table, out, num_ids, float(scale))
    sizes = {"D": hidden, "TILE": _TILE}
    launch(embed_kernel, grid, *args, **sizes, IS_SCALED=scale != 1.0, num_warps=4)
    return out


def check_norm_weights(dtype: torch.dtype, **weights: Tensor) -> None:
    """Raises ValueError: they are not all in the model's dtype, or all in float32."""
    dtypes = {weight.dtype for weight in weights.values()}
    check_tensors(torch.float32 if dtypes == {torch.float32} else dtype, **weights)


@triton.jit
def add_rmsnorm_kernel(
    x,
    residual,
    weight,
    normed,
    eps,
    x_stride,
    HAS_RESIDUAL: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, TILE)
    dtype = normed.dtype.element_ty
    hidden = tl.load(x + row * x_stride + d, mask=d < D, other=0.0)
    if HAS_RESIDUAL:
        before = tl.load(residual + row * D + d, mask=d < D, other=0.0)
        hidden = (before.to(tl.float32) + hidden.to(tl.float32)).to(dtype)
        tl.store(residual + row * D + d, hidden, mask=d < D)
    hidden = hidden.to(tl.float32)
    scale = tl.rsqrt(tl.sum(hidden * hidden) / D + eps)
    hidden = hidden * scale
    if ROUNDS_FIRST:
        hidden = hidden.to(dtype).to(tl.float32)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(normed + row * D + d, (w * hidden).to(dtype), mask=d < D)


@triton.jit
def head_rmsnorm_kernel(
    qkv,
    q_weight,
    k_weight,
    eps,
    qkv_stride,
    H: tl.constexpr,
    E: tl.constexpr,
    TILE: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    e = tl.arange(0, TILE)
    dtype = qkv.dtype.element_ty
    at = qkv + row * qkv_stride + head * E + e
    x = tl.load(at, mask=e < E, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / E + eps)
    normed = x * scale
    if ROUNDS_FIRST:
        normed = normed.to(dtype).to(tl.float32)
    of_query = tl.where(head < H, E, 0)  # the other weight is read nowhere
    w = tl.load(q_weight + e, mask=e < of_query, other=0.0)
    w += tl.load(k_weight + e, mask=e < E - of_query, other=0.0)
    w = w.to(tl.float32)
    tl.store(at, (w * normed).to(dtype), mask=e < E)


@triton.jit(do_not_specialize=["layer", "slots_stride"])
def rope_store_kernel(
    qkv,
    cos,
    sin,
    write_slots,
    k_pool,
    v_pool,
    layer,
    qkv_stride,
    slots_stride,
    G: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    HALF: tl.constexpr = E // 2
    slot = tl.load(write_slots + row * slots_stride) + layer.to(tl.int64) * PAGE
    place = (slot * G + g) * E
    i = tl.arange(0, HALF)
    j = tl.arange(0, HEADS)
    # The group's query heads, then its key head.
    head = tl.where(j < R, g * R + j, G * R + g)
    at = qkv + row * qkv_stride + head[:, None] * E + i[None, :]
    is_head = (j <= R)[:, None]
    first = tl.load(at, mask=is_head, other=0.0)
    second = tl.load(at + HALF, mask=is_head, other=0.0)
    angles = row * E + i
    rotated = _rotate(first, -second, tl.load(cos + angles), tl.load(sin + angles))
    angles += HALF
    rotated_second = _rotate(second, first, tl.load(cos + angles), tl.load(sin + angles))
    tl.store(at, rotated, mask=is_head)
    tl.store(at + HALF, rotated_second, mask=is_head)
    is_key = (j == R)[:, None]
    key = k_pool + place + tl.zeros_like(head)[:, None] + i[None, :]
    tl.store(key, rotated, mask=is_key)
    tl.store(key + HALF, rotated_second, mask=is_key)
    e = tl.arange(0, E)
    value = tl.load(qkv + row * qkv_stride + (G * R + G + g) * E + e)
    tl.store(v_pool + place + e, value)


@triton.jit
def _rotate(x, other, cos, sin):
    """x * cos + other * sin, each operation rounded to the dtype."""
    dtype = x.dtype
    cosine = (x.to(tl.float32) * cos.to(tl.float32)[None, :]).to(dtype)
    sine = (other.to(tl.float32) * sin.to(tl.float32)[None, :]).to(dtype)
    return (cosine.to(tl.float32) + sine.to(tl.float32)).to(dtype)


@triton.jit
def silu_mul_kernel(gate_up, out, WIDTH: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    dtype = out.dtype.element_ty
    gate = tl.load(gate_up + row * (2 * WIDTH) + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + i, mask=i < WIDTH, other=0.0)
    silu = (gate / (1 + tl.exp(tl.minimum(-gate, 88.0)))).to(dtype)  # exp(89) is infinite
    tl.store(out + row * WIDTH + i, silu * up, mask=i < WIDTH)


@triton.jit(do_not_specialize=["num_ids"])
def embed_kernel(
    rows,
    last_ids,
    table,
    out,
    num_ids,
    scale,
    D: tl.constexpr,
    TILE: tl.constexpr,
    IS_SCALED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(rows + row * ROW_COLUMNS + TOKEN_ID)
    if token < 0:
        token = tl.load(last_ids + tl.load(rows + row * ROW_COLUMNS + SEAT))
    width = tl.where((token >= 0) & (token < num_ids), D, 0)
    d = tl.program_id(1) * TILE + tl.arange(0, TILE)
    value = tl.load(table + token.to(tl.int64) * D + d, mask=d < width, other=0.0)
    if IS_SCALED:
        value = (value.to(tl.float32) * scale).to(value.dtype)
    tl.store(out + row * D + d, value, mask=d < D)
