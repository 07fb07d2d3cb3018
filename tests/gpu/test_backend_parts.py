"""Pool, staging, graphs and the fused decoder on a CUDA device."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model

from dycoke_core.compression.flops import TextGeometry
from dycoke_core.engine.backends.cuda.graphs import CudaGraphs, DecodeGraphs, GraphKey
from dycoke_core.engine.backends.cuda.pool import KVPool, RowShape
from dycoke_core.engine.backends.cuda.staging import ResultDownloads, StepLayout, StepUploads
from dycoke_core.engine.backends.cuda.tiles import TileCapacity
from dycoke_core.gpu_kernels.rows import PAGE
from dycoke_core.model.fused import FusedDecoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda")
SMALL, LARGE = GraphKey(2, 16), GraphKey(64, 16)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


class Product:
    """A step of static buffers with a matrix product and memory of its own."""

    def __init__(self) -> None:
        self.input = torch.zeros(LARGE.batch, 256, device=CUDA)
        self.weight = torch.randn(256, 256, device=CUDA)
        self.fails = False
        self.num_calls = 0

    def run(self, key: GraphKey) -> Tensor:
        self.num_calls += 1
        if self.fails:
            self.input.sum().item()  # waits for the device, which no capture may
        return (self.input[: key.batch] @ self.weight).relu() + 1

    def expected(self, key: GraphKey) -> Tensor:
        return (self.input[: key.batch] @ self.weight).relu() + 1


def new_graphs() -> DecodeGraphs[Tensor]:
    return DecodeGraphs([SMALL, LARGE], lambda: CudaGraphs(CUDA))


@torch.inference_mode()
def test_a_replayed_graph_computes_from_the_buffers_as_they_are() -> None:
    step, graphs = Product(), new_graphs()
    graphs.capture_all(step.run)
    assert not graphs.is_eager
    num_calls = step.num_calls
    for _ in range(3):
        for key in (SMALL, LARGE):
            step.input.normal_()
            torch.testing.assert_close(graphs.replay(key), step.expected(key))
    assert step.num_calls == num_calls


@torch.inference_mode()
def test_a_failed_capture_leaves_stream_and_device_usable() -> None:
    step, graphs = Product(), new_graphs()
    stream = torch.cuda.current_stream()
    step.fails = True
    graphs.capture_all(step.run)
    assert graphs.is_eager and torch.cuda.current_stream() == stream
    step.input.normal_()
    torch.testing.assert_close(graphs.replay(SMALL), step.expected(SMALL))
    step.fails = False
    graphs.capture_all(step.run)
    assert not graphs.is_eager
    step.input.normal_()
    torch.testing.assert_close(graphs.replay(SMALL), step.expected(SMALL))


@torch.inference_mode()
def test_dropped_graphs_give_their_memory_back() -> None:
    step, graphs = Product(), new_graphs()
    graphs.capture_all(step.run)
    graphs.drop()
    reserved = torch.cuda.memory_reserved()
    for _ in range(3):
        graphs.capture_all(step.run)
        graphs.drop()
    assert torch.cuda.memory_reserved() <= reserved


def test_steps_go_and_results_come_without_waiting_for_the_device() -> None:
    layout = StepLayout(4, TileCapacity(10, 10, 40))
    uploads = StepUploads(layout.num_words, CUDA, depth=1)
    downloads = ResultDownloads(4, CUDA, depth=1)
    results = torch.zeros(3, 4, dtype=torch.int32, device=CUDA)
    pending = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(6):
            host = uploads.begin(layout)
            host.rows[:] = step
            host.uniforms[:] = step / 8
            device = uploads.send(layout)
            results.copy_(device.rows[:, :3].t() + 10 * device.uniforms.to(torch.int32))
            pending.append(downloads.start(results))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [download.read().refreshes.tolist() for download in pending] == [
        [step] * 4 for step in range(6)
    ]


def test_a_pinned_pool_is_pinned() -> None:
    pool = KVPool.pinned(2**20, RowShape(2, 2, 8, torch.float16))
    assert pool.keys.is_pinned() and pool.values.is_pinned()
    assert pool.keys.nbytes == 2**19


@torch.inference_mode()
def test_the_fused_decoder_gives_the_hidden_states_of_transformers() -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        attn_implementation="sdpa",
    )
    model = Qwen2Model(config).to(CUDA).eval()
    geometry = TextGeometry(256, 512, 3, 14, 2, 64, 300)
    embeds = torch.randn(50, 256, device=CUDA)
    expected = model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]
    decoder = FusedDecoder(model, nn.Linear(256, 300, bias=False).to(CUDA), geometry)
    pool = KVPool(RowShape(3, 2, 64, torch.float32), 4 * 3 * PAGE, CUDA)
    extent = pool.allocate(50, 0, 3)
    assert extent is not None
    slots = torch.from_numpy(extent.slots()).to(CUDA)
    cos, sin = decoder.rotary(torch.arange(50, device=CUDA)[None])

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (each.transpose(0, 1)[None] for each in (q, k, v))
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return attended[0].transpose(0, 1).flatten(1)

    hidden = decoder.run(embeds, cos, sin, slots, pool.keys, pool.values, attend)
    assert (hidden - expected).abs().max() <= 1e-5 * expected.abs().max()
