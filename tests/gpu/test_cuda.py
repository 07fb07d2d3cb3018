"""The engine on a CUDA device: the CPU's answers, no wait per step, bytes that are really freed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dycoke_core.engine.model_runner import ModelRunner
from torch import Tensor

from dycoke_core.config import EngineConfig
from dycoke_core.engine.attention import (
    attend,
    attend_causally,
    merge,
    pack_queries,
    unpack_rows,
)
from dycoke_core.engine.state import SequenceState
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.loader import load_model
from dycoke_core.sequence import Sequence, Stage
from tests.engine.recording import (
    RecordingEngine,
    assert_same_kept,
    assert_same_logits,
    make_sequence,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

POLICIES = ["full", "dycoke", {"policy": "dycoke", "l": 0, "p": 0.5}]


@pytest.fixture(scope="module")
def cuda_model(random_checkpoint: Path) -> Iterator[LlavaOnevision]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield load_model(random_checkpoint, device="cuda", dtype="float32")
    torch.backends.cuda.matmul.allow_tf32 = before


def sequences() -> list[Sequence]:
    return [
        make_sequence(f"{index}", video=index, compression=policy, max_tokens=12)
        for index, policy in enumerate(POLICIES)
    ]


def engine_on(model: LlavaOnevision, **settings: object) -> RecordingEngine:
    config = EngineConfig(device=str(model.device), kv_cache_bytes=2**30, **settings)  # type: ignore[arg-type]
    return RecordingEngine(model, config)


@pytest.mark.parametrize("dp_cache", ["device", "host"])
def test_a_mixed_batch_gives_the_cpus_logits_and_kept_sets(
    dp_cache: str, cuda_model: LlavaOnevision, engine: RecordingEngine
) -> None:
    on_cuda = engine_on(cuda_model, dp_cache=dp_cache)
    on_cuda.run(*sequences())
    engine.run(*sequences())
    for name, expected in engine.recordings.items():
        found = on_cuda.recordings[name]
        assert_same_logits([row.cpu() for row in found.logits], expected.logits)
        assert_same_kept([kept.cpu() for kept in found.kept], expected.kept)
    assert on_cuda.stats().kv_bytes_in_use == 0


def decode_until_steady(engine: RecordingEngine) -> list[SequenceState]:
    for sequence in sequences():
        engine.add(sequence)
    while any(state.sequence.stage is not Stage.DECODING for state in engine._states.values()):
        engine.step()
    engine.step()
    return list(engine._states.values())


@torch.inference_mode()
def test_a_decode_pass_never_waits_for_the_device(cuda_model: LlavaOnevision) -> None:
    engine = engine_on(cuda_model)
    decoding = decode_until_steady(engine)
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = ModelRunner(cuda_model).run([], [], decoding, [True] * len(decoding))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(logits).all()


def test_a_dp_cache_on_the_host_frees_device_memory(cuda_model: LlavaOnevision) -> None:
    held = {}
    for place in ("device", "host"):
        engine = engine_on(cuda_model, dp_cache=place)
        before = torch.cuda.memory_allocated()
        engine.add(make_sequence(num_frames=32, compression="dycoke", max_tokens=30))
        while not engine.step():
            pass
        held[place] = torch.cuda.memory_allocated() - before
        engine.abort("a")
        engine.clear_caches()
    assert held["host"] < 0.6 * held["device"]


def test_all_device_memory_of_sequences_comes_back(cuda_model: LlavaOnevision) -> None:
    engine = engine_on(cuda_model)
    engine.run(*sequences())
    engine.clear_caches()
    engine.recordings.clear()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        engine.run(*sequences())
        engine.clear_caches()
        engine.recordings.clear()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(14, 2, 64), (28, 4, 128)])
@pytest.mark.parametrize("num_new", [1, 2, 33, 130])
def test_fused_parts_merge_to_exact_attention(
    num_new: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    num_heads, num_kv_heads, size = heads
    generator = torch.Generator("cuda").manual_seed(num_new)

    def rows(number: int, count: int) -> Tensor:
        shape = (number, count, size)
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    old_keys, old_values = rows(300, num_kv_heads), rows(300, num_kv_heads)
    query, keys, values = rows(num_new, num_heads), *(rows(num_new, num_kv_heads) for _ in "kv")
    earlier = attend(pack_queries(query, num_kv_heads), old_keys, old_values, scaling=size**-0.5)
    own = attend_causally(query, keys, values, scaling=size**-0.5)
    merged = unpack_rows(merge(earlier, own).output, num_new)

    groups = num_heads // num_kv_heads
    all_keys = torch.cat([old_keys, keys]).double().repeat_interleave(groups, dim=1)
    all_values = torch.cat([old_values, values]).double().repeat_interleave(groups, dim=1)
    logits = torch.einsum("qhe,khe->hqk", query.double(), all_keys) * size**-0.5
    ahead = torch.ones(num_new, num_new, dtype=torch.bool, device="cuda").triu(1)
    logits[:, :, 300:].masked_fill_(ahead, -torch.inf)
    exact = torch.einsum("hqk,khe->qhe", logits.softmax(dim=-1), all_values)
    torch.testing.assert_close(merged.double(), exact, atol=2e-2, rtol=0)


def test_bfloat16_runs_through_the_fused_kernels(random_checkpoint: Path) -> None:
    model = load_model(random_checkpoint, device="cuda", dtype="bfloat16")
    engine = engine_on(model)
    events = engine.run(*sequences())
    assert all(ends[-1].report is not None for ends in events.values())
    assert all(torch.isfinite(row).all() for r in engine.recordings.values() for row in r.logits)
