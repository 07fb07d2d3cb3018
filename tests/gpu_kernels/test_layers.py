"""The layer's small operations: transformers' own, rounding included."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

from dycoke_core.gpu_kernels.layers import add_rmsnorm, embed, head_rmsnorm, rope_store, silu_mul
from dycoke_core.gpu_kernels.rows import PAGE, ROW_COLUMNS, WRITE_SLOT
from tests.gpu_kernels.slot_lists import DEVICE, DTYPES, SlotPool, int32, table_row


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_nearly_equal(result: Tensor, expected: Tensor) -> None:
    """Bit for bit, except for a few values that a different square root rounds the other way."""
    precision = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[expected.dtype]
    if expected.dtype != torch.float32:
        assert (result == expected).float().mean() > 0.98
    torch.testing.assert_close(result, expected, rtol=precision, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 64, 100, 896, 8192])
def test_norm_of_the_sum_with_the_residual(hidden: int, dtype: torch.dtype) -> None:
    norm = Qwen2RMSNorm(hidden, eps=1e-6).to(DEVICE, dtype)
    norm.weight.data = random(hidden, dtype=dtype, seed=2)
    x, residual = random(3, hidden, dtype=dtype), random(3, hidden, dtype=dtype, seed=1)
    expected_residual = residual + x
    normed = add_rmsnorm(x, residual, norm.weight.data, 1e-6)
    assert torch.equal(residual, expected_residual)
    assert_nearly_equal(normed, norm(expected_residual).detach())


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_without_a_residual_reads_rows_of_any_stride(dtype: torch.dtype) -> None:
    norm = Qwen2RMSNorm(48, eps=1e-5).to(DEVICE, dtype)
    x = random(3, 200, dtype=dtype)[:, 20:68]
    before = x.clone()
    assert_nearly_equal(add_rmsnorm(x, None, norm.weight.data, 1e-5), norm(x).detach())
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "size"), [(4, 2, 16), (3, 3, 48)])
def test_norms_of_queries_and_keys_leave_values_alone(
    num_heads: int, num_kv_heads: int, size: int, dtype: torch.dtype
) -> None:
    norms = [Qwen2RMSNorm(size, eps=1e-6).to(DEVICE, dtype) for _ in range(2)]
    for seed, norm in enumerate(norms):
        norm.weight.data = random(size, dtype=dtype, seed=seed)
    qkv = random(5, (num_heads + 2 * num_kv_heads) * size, dtype=dtype, seed=3)
    sizes = [num_heads, num_kv_heads, num_kv_heads]
    q, k, v = qkv.clone().view(5, -1, size).split(sizes, dim=1)
    head_rmsnorm(qkv, norms[0].weight.data, norms[1].weight.data, 1e-6, num_heads=num_heads)
    normed_q, normed_k, same_v = qkv.view(5, -1, size).split(sizes, dim=1)
    assert_nearly_equal(normed_q, norms[0](q).detach())
    assert_nearly_equal(normed_k, norms[1](k).detach())
    assert torch.equal(same_v, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(14, 2), (4, 2), (3, 3)])
def test_rotation_is_transformers_own_and_lands_at_its_slot(
    num_heads: int, num_kv_heads: int, dtype: torch.dtype
) -> None:
    pool, size, n, layer = SlotPool(num_kv_heads, 16, dtype), 16, 5, 6
    slots = pool.take(n, layers=(5, 8))
    angles = torch.arange(n)[:, None] * torch.rand(size // 2)[None, :] * 50
    angles = torch.cat([angles, angles], -1).to(DEVICE)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    qkv = random(n, (num_heads + 2 * num_kv_heads) * size, dtype=dtype)
    heads = qkv.clone().view(n, -1, size)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)
    table = int32([table_row(write_slot=slot) for slot in slots])
    assert table.shape == (n, ROW_COLUMNS)
    expected_keys, expected_values = pool.keys.clone(), pool.values.clone()
    places = torch.tensor(slots, device=DEVICE) + layer * PAGE
    expected_keys[places], expected_values[places] = k, v
    rope_store(
        *(qkv, cos, sin, table[:, WRITE_SLOT], pool.keys, pool.values),
        layer=layer,
        num_heads=num_heads,
    )
    assert torch.equal(qkv.view(n, -1, size), torch.cat([q, k, v], dim=1))
    assert torch.equal(pool.keys, expected_keys) and torch.equal(pool.values, expected_values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 512, 1023, 1025])
def test_gated_activation(width: int, dtype: torch.dtype) -> None:
    gate_up = random(3, 2 * width, dtype=dtype) * 4
    gate_up[0, 0] = -200.0
    expected = silu(gate_up[:, :width]) * gate_up[:, width:]
    assert_nearly_equal(silu_mul(gate_up), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [16, 1100])
def test_rows_begin_with_their_token_or_the_last_one_of_their_seat(
    hidden: int, dtype: torch.dtype
) -> None:
    table, last_ids = random(30, hidden, dtype=dtype), int32([0, 17, 4])
    rows = [
        table_row(token_id=29),
        table_row(seat=1),
        table_row(seat=2),
        table_row(seat=1, token_id=0),
        table_row(token_id=30),  # in no row of the table
    ]
    embeds = embed(int32(rows), last_ids, table)
    assert torch.equal(embeds[:4], table[[29, 17, 4, 0]]) and (embeds[4] == 0).all()


def test_arguments_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="at most 8192"):
        add_rmsnorm(torch.zeros(1, 8193), None, torch.zeros(8193), 1e-6)
    with pytest.raises(ValueError, match="weight"):
        add_rmsnorm(x, None, torch.zeros(8, dtype=torch.float16), 1e-6)
    with pytest.raises(ValueError, match="residual"):
        add_rmsnorm(x, torch.zeros(3, 8), torch.zeros(8), 1e-6)
    with pytest.raises(ValueError, match="2I"):
        silu_mul(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="rows"):
        embed(torch.zeros(2, 8, dtype=torch.int32), int32([0]), torch.zeros(3, 8))
    pools = torch.zeros(64, 1, 16), torch.zeros(64, 1, 16)
    angles = torch.zeros(2, 16)
    with pytest.raises(ValueError, match="qkv"):
        rope_store(torch.zeros(2, 47), angles, angles, int32([0, 0]), *pools, layer=0, num_heads=1)
