"""Gemma's small operations: transformers' own, rounding included."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3RMSNorm,
    Gemma3TextScaledWordEmbedding,
)

from dycoke_core.gpu_kernels.layers import (
    add_rmsnorm,
    embed,
    gelu_mul,
    head_rmsnorm,
    norm_add_rmsnorm,
)
from tests.gpu_kernels.slot_lists import DEVICE, DTYPES, int32, table_row
from tests.gpu_kernels.test_layers import assert_nearly_equal, random


def norm_of(size: int, dtype: torch.dtype, seed: int) -> tuple[Gemma3RMSNorm, Tensor]:
    """A norm, and its weight as the kernels take it."""
    norm = Gemma3RMSNorm(size, eps=1e-6).to(DEVICE, dtype)
    norm.weight.data = random(size, dtype=dtype, seed=seed)
    return norm, 1.0 + norm.weight.data.float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 64, 100, 2560])
def test_what_is_added_goes_through_a_norm_first(hidden: int, dtype: torch.dtype) -> None:
    (after, after_weight), (before, weight) = (norm_of(hidden, dtype, seed) for seed in (2, 3))
    x = random(3, hidden + 5, dtype=dtype)[:, 5:]
    residual = random(3, hidden, dtype=dtype, seed=1)
    expected_residual = residual + after(x).detach()
    normed = norm_add_rmsnorm(x, residual, after_weight, weight, 1e-6)
    assert_nearly_equal(residual, expected_residual)
    assert_nearly_equal(normed, before(residual).detach())


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_round_once_where_their_weights_are_in_float32(dtype: torch.dtype) -> None:
    norm, weight = norm_of(48, dtype, seed=4)
    x = random(5, 48, dtype=dtype)
    assert_nearly_equal(add_rmsnorm(x, None, weight, 1e-6), norm(x).detach())
    of_keys, key_weight = norm_of(48, dtype, seed=5)
    qkv = random(5, 4 * 48, dtype=dtype, seed=6)
    q, k, v = qkv.clone().view(5, 4, 48).split([2, 1, 1], dim=1)
    head_rmsnorm(qkv, weight, key_weight, 1e-6, num_heads=2)
    normed_q, normed_k, same_v = qkv.view(5, 4, 48).split([2, 1, 1], dim=1)
    assert_nearly_equal(normed_q, norm(q).detach())
    assert_nearly_equal(normed_k, of_keys(k).detach())
    assert torch.equal(same_v, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 512, 1025])
def test_gated_activation(width: int, dtype: torch.dtype) -> None:
    gate_up = random(3, 2 * width, dtype=dtype) * 4
    gate_up[0, 0] = -20.0
    expected = gelu(gate_up[:, :width], approximate="tanh") * gate_up[:, width:]
    precision = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(gelu_mul(gate_up), expected, rtol=precision, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_are_scaled(dtype: torch.dtype) -> None:
    table = Gemma3TextScaledWordEmbedding(30, 40, 0, embed_scale=40**0.5).to(DEVICE, dtype)
    table.weight.data = random(30, 40, dtype=dtype)
    rows = int32([table_row(token_id=29), table_row(seat=1)])
    scale = float(table.embed_scale.to(dtype))
    embeds = embed(rows, int32([0, 17]), table.weight.data, scale)
    assert torch.equal(embeds, table(torch.tensor([29, 17], device=DEVICE)).detach())


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, weight = random(2, 8, dtype=torch.float16), torch.ones(8, device=DEVICE)
    for wrong in (
        (x, x[:1], weight, weight),
        (x, x, weight.half(), weight),
        (x, x, weight, weight[:4]),
    ):
        with pytest.raises(ValueError):
            norm_add_rmsnorm(*wrong, 1e-6)
    with pytest.raises(ValueError):
        gelu_mul(random(2, 7, dtype=torch.float32))
