"""Packed weights compute what plain ones do, up to bfloat16's rounding."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, SiglipVisionConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.siglip.modeling_siglip import SiglipMLP

from dycoke_core.config import EngineConfig
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.loader import load_model
from dycoke_core.model.packing import (
    PackedGatedMlp,
    PackedLinear,
    PackedMlp,
    block_sizes,
    can_pack,
    pack_weights,
)
from tests.engine.recording import RecordingEngine, make_sequence, report_of

CPU = torch.device("cpu")


def gated_mlp() -> nn.Module:
    return Qwen2MLP(Qwen2Config(hidden_size=96, intermediate_size=200))


def gelu_mlp() -> nn.Module:
    config = SiglipVisionConfig(
        hidden_size=96, intermediate_size=200, hidden_act="gelu_pytorch_tanh"
    )
    return SiglipMLP(config)


def linear() -> nn.Module:
    return nn.Linear(96, 72)


def errors(module: nn.Module, rows: Tensor) -> tuple[float, float]:
    """Largest distance from the float32 result: of the packed module, and of the plain one."""
    exact = deepcopy(module).float()(rows.float())
    holder = nn.ModuleDict({"it": deepcopy(module)})
    pack_weights(holder)
    packed, plain = holder["it"](rows), module(rows)
    assert packed.dtype == torch.bfloat16 and packed.shape == plain.shape
    distances = [(output.float() - exact).abs().max().item() for output in (packed, plain)]
    return distances[0], distances[1]


@pytest.mark.parametrize("make_module", [linear, gated_mlp, gelu_mlp])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (1, 8), (1, 200), (1, 512), (1, 1300), (3, 401)])
@torch.inference_mode()
def test_a_packed_module_is_as_exact_as_the_plain_one(
    make_module: Callable[[], nn.Module], shape: tuple[int, int]
) -> None:
    torch.manual_seed(shape[1])
    module = make_module().to(torch.bfloat16)
    packed, plain = errors(module, torch.randn(*shape, 96).to(torch.bfloat16))
    assert packed <= 1.5 * plain


@pytest.mark.parametrize("num_rows", [513, 544, 1000, 2960, 4096, 7681, 8748])
def test_blocks_of_rows_are_nearly_equal_and_never_too_large(num_rows: int) -> None:
    sizes = block_sizes(num_rows)
    assert sum(sizes) == num_rows
    assert max(sizes) <= 512
    assert max(sizes) - min(sizes) <= 63, "a tile, and what the last tile lacks"
    assert all(size % 32 == 0 for size in sizes[:-1])


@pytest.mark.parametrize(
    ("module", "expected"),
    [(linear(), PackedLinear), (gated_mlp(), PackedGatedMlp), (gelu_mlp(), PackedMlp)],
)
@torch.inference_mode()
def test_known_forms_become_one_packed_module(module: nn.Module, expected: type) -> None:
    holder = nn.ModuleDict({"it": module.to(torch.bfloat16)})
    pack_weights(holder)
    assert type(holder["it"]) is expected


@torch.inference_mode()
def test_an_mlp_of_another_activation_keeps_it_between_packed_products() -> None:
    config = Qwen2Config(hidden_size=96, intermediate_size=200, hidden_act="relu")
    mlp = Qwen2MLP(config).to(torch.bfloat16)
    rows = torch.randn(4, 96).to(torch.bfloat16)
    expected = mlp(rows)
    holder = nn.ModuleDict({"it": mlp})
    pack_weights(holder)
    assert type(holder["it"]) is Qwen2MLP and type(mlp.gate_proj) is PackedLinear
    torch.testing.assert_close(holder["it"](rows), expected)


def test_only_bfloat16_on_a_cpu_is_packed(tiny_model: LlavaOnevision) -> None:
    assert can_pack(CPU, torch.bfloat16)
    assert not can_pack(CPU, torch.float32) and not can_pack(CPU, torch.float16)
    assert not can_pack(torch.device("cuda"), torch.bfloat16)
    assert isinstance(tiny_model.model.lm_head, nn.Linear)


@torch.inference_mode()
def test_a_packed_model_keeps_its_embedding_and_answers_near_float32(
    tiny_model: LlavaOnevision, random_checkpoint: Path
) -> None:
    model = load_model(random_checkpoint, device="cpu", dtype="bfloat16")
    kinds = {type(module) for module in model.model.modules()}
    assert nn.Linear not in kinds and {PackedLinear, PackedGatedMlp, PackedMlp} <= kinds
    assert model.dtype == torch.bfloat16 and model.device == CPU
    assert model.embed_tokens([1, 2]).shape == (2, model.text_geometry.hidden_size)
    recordings = {}
    for name, each in (("float32", tiny_model), ("bfloat16", model)):
        engine = RecordingEngine(each, EngineConfig(device="cpu"))
        events = engine.run(make_sequence(max_tokens=4))["a"]
        assert report_of(events).completion_tokens == len(engine.recordings["a"].logits)
        assert engine.stats().kv_bytes_in_use == 0
        recordings[name] = engine.recordings["a"].logits[0]
    scale = recordings["float32"].abs().max()
    assert (recordings["bfloat16"] - recordings["float32"]).abs().max() < 0.05 * scale
