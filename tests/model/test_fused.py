"""The fused decoder computes what transformers' Qwen2 does, from the same memory."""

from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dycoke_core.engine.backends.cuda.pool import KVPool, RowShape
from dycoke_core.gpu_kernels import layers as triton_kernels
from dycoke_core.gpu_kernels.rows import PAGE
from dycoke_core.model.fused import FusedDecoder, LayerKernels
from dycoke_core.model.llava_onevision import LlavaOnevision
from tests.model.plain_kernels import PlainKernels

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_model: LlavaOnevision) -> LlavaOnevision:
    """One that a test may change."""
    return LlavaOnevision(
        model=deepcopy(tiny_model.model),
        prompt_encoder=tiny_model.prompt_encoder,
        normalizer=tiny_model.normalizer,
        eos_token_ids=tiny_model.eos_token_ids,
        weights_digest=tiny_model.weights_digest,
    )


def language_model(model: LlavaOnevision) -> Any:
    return model.model.model.language_model


def fused(model: LlavaOnevision, kernels: LayerKernels | None = None) -> FusedDecoder:
    head = model.model.lm_head
    kernels = kernels or PlainKernels()
    return FusedDecoder(language_model(model), head, model.text_geometry, kernels)


def new_pool(model: LlavaOnevision, num_tokens: int) -> tuple[KVPool, Tensor]:
    """A pool and the slots of this many tokens in it, in no particular order."""
    geometry = model.text_geometry
    shape = RowShape(geometry.num_layers, geometry.num_kv_heads, geometry.head_size, torch.float32)
    pool = KVPool(shape, 8 * PAGE * geometry.num_layers, CPU)
    extent = pool.allocate(num_tokens, 0, geometry.num_layers)
    assert extent is not None
    return pool, torch.from_numpy(extent.slots())[torch.randperm(num_tokens)]


def attend_causally(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
    attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return attended[0].transpose(0, 1).flatten(1)


def random_embeds(model: LlavaOnevision, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    vocabulary = model.text_geometry.vocab_size
    ids = torch.randint(vocabulary, (num_tokens,), generator=generator)
    return language_model(model).embed_tokens(ids).detach().clone()


@torch.inference_mode()
def forward(model: LlavaOnevision, embeds: Tensor, positions: Tensor) -> Tensor:
    """transformers' own layers and attention."""
    reference = deepcopy(language_model(model))
    reference.set_attn_implementation("sdpa")
    output = reference(inputs_embeds=embeds[None], position_ids=positions[None], use_cache=False)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


@pytest.mark.parametrize("num_tokens", [1, 2, 20])
@pytest.mark.parametrize("kernels", [PlainKernels(), triton_kernels])
@torch.inference_mode()
def test_a_prefill_gives_the_hidden_states_of_transformers(
    kernels: LayerKernels, num_tokens: int, model: LlavaOnevision
) -> None:
    embeds, positions = random_embeds(model, num_tokens), torch.arange(3, 3 + num_tokens)
    expected = forward(model, embeds, positions)
    decoder = fused(model, kernels)
    pool, slots = new_pool(model, num_tokens)
    cos, sin = decoder.rotary(positions[None])
    hidden = decoder.run(embeds, cos, sin, slots, pool.keys, pool.values, attend_causally)
    assert (hidden - expected).abs().max() <= 1e-5 * expected.abs().max()
    torch.testing.assert_close(
        decoder.logits(hidden).float(), model.logits(expected), rtol=1e-4, atol=1e-4
    )


@torch.inference_mode()
def test_a_decode_step_reads_from_the_pool_what_the_prefill_stored(model: LlavaOnevision) -> None:
    num_tokens, positions = 90, torch.arange(90)
    embeds = random_embeds(model, num_tokens)
    expected = forward(model, embeds, positions)
    decoder = fused(model)
    pool, slots = new_pool(model, num_tokens)
    cos, sin = decoder.rotary(positions[None])

    def attend_to_all(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = slots.long() + layer * PAGE
        keys, values = (pooled[rows].transpose(0, 1)[None] for pooled in (pool.keys, pool.values))
        attended = nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys, values, enable_gqa=True, scale=decoder.scaling
        )
        return attended[0].transpose(0, 1).flatten(1)

    run: dict[str, Any] = {"keys": pool.keys, "values": pool.values}
    decoder.run(embeds[:-1].clone(), cos[:-1], sin[:-1], slots[:-1], attend=attend_causally, **run)
    last = decoder.run(embeds[-1:], cos[-1:], sin[-1:], slots[-1:], attend=attend_to_all, **run)
    assert (last - expected[-1:]).abs().max() <= 1e-5 * expected.abs().max()


@torch.inference_mode()
def test_a_layer_takes_ten_launches(model: LlavaOnevision) -> None:
    decoder = fused(model)
    kernels = decoder.kernels
    assert isinstance(kernels, PlainKernels)
    pool, slots = new_pool(model, 2)
    cos, sin = decoder.rotary(torch.arange(2)[None])
    products = 0
    linear = nn.functional.linear

    def counted(*args: Any) -> Tensor:
        nonlocal products
        products += 1
        return linear(*args)

    nn.functional.linear = counted
    try:
        embeds = random_embeds(model, 2)
        decoder.run(embeds, cos, sin, slots, pool.keys, pool.values, attend_causally)
    finally:
        nn.functional.linear = linear
    num_layers = model.text_geometry.num_layers
    calls = Counter(kernels.calls)
    assert products == 4 * num_layers
    assert calls == {
        "add_rmsnorm": 2 * num_layers + 1,  # the last one is the final norm
        "rope_store": num_layers,
        "silu_mul": num_layers,
    }
    launches_of_attention = 2
    per_layer = (products + sum(calls.values()) - 1) / num_layers + launches_of_attention
    assert per_layer == 10


def memory_of(module: nn.Module) -> int:
    """Bytes of the distinct storages that parameters lie in."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in module.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


@torch.inference_mode()
def test_merged_weights_are_held_once_and_transformers_reads_them(model: LlavaOnevision) -> None:
    ids = torch.arange(40)[None]
    module = model.model
    module.set_attn_implementation("sdpa")
    before, held = module(input_ids=ids).logits, memory_of(module)
    names = [name for name, _ in module.named_parameters()]
    decoder = fused(model)
    assert memory_of(module) == held
    assert [name for name, _ in module.named_parameters()] == names
    layer, attention = decoder.layers[0], language_model(model).layers[0].self_attn
    assert attention.q_proj.weight.data_ptr() == layer.qkv.weight.data_ptr()
    offset = attention.q_proj.weight.nbytes + attention.k_proj.weight.nbytes
    assert attention.v_proj.weight.data_ptr() == layer.qkv.weight.data_ptr() + offset
    assert layer.qkv.bias is not None
    assert attention.q_proj.bias.data_ptr() == layer.qkv.bias.data_ptr()
    up = language_model(model).layers[0].mlp.up_proj.weight
    assert up.data_ptr() == layer.gate_up.weight.data_ptr() + up.nbytes
    assert torch.equal(module(input_ids=ids).logits, before)


def test_a_second_decoder_of_a_model_shares_the_merged_weights(model: LlavaOnevision) -> None:
    first, second = fused(model), fused(model)
    for one, other in zip(first.layers, second.layers, strict=True):
        assert one.qkv.weight.data_ptr() == other.qkv.weight.data_ptr()
        assert one.gate_up.weight.data_ptr() == other.gate_up.weight.data_ptr()
        assert torch.equal(one.qkv.weight, other.qkv.weight)
        assert one.qkv.bias is not None and other.qkv.bias is not None
        assert torch.equal(one.qkv.bias, other.qkv.bias)


class TwoAxes(nn.Module):
    """Joins the positions of two axes, half of a head each."""

    rope_type = "default"

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        assert position_ids.shape == (2, 1, 3)
        angles = position_ids.to(x.dtype)[..., None].expand(-1, -1, -1, 32)
        angles = torch.cat(list(angles), dim=-1)
        return angles.cos(), angles.sin()


def test_positions_may_have_several_axes(model: LlavaOnevision) -> None:
    language_model(model).rotary_emb = TwoAxes()
    cos, _ = fused(model).rotary(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert cos.shape == (3, 64)
    assert torch.equal(cos[:, [0, -1]], torch.tensor([[1.0, 4], [2, 5], [3, 6]]).cos())


@torch.inference_mode()
def test_a_model_without_biases_is_taken(model: LlavaOnevision) -> None:
    for layer in language_model(model).layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.bias = None
    embeds, positions = random_embeds(model, 20), torch.arange(20)
    expected = forward(model, embeds, positions)
    decoder = fused(model)
    pool, slots = new_pool(model, 20)
    cos, sin = decoder.rotary(positions[None])
    hidden = decoder.run(embeds, cos, sin, slots, pool.keys, pool.values, attend_causally)
    assert (hidden - expected).abs().max() <= 1e-5 * expected.abs().max()
