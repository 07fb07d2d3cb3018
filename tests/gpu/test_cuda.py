"""The engine on a CUDA device: the CPU's answers, no wait per step, bytes that are really freed."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dycoke_core.config import EngineConfig
from dycoke_core.engine import Engine
from dycoke_core.engine.partial_attention import (
    attend,
    attend_causally,
    merge,
    pack_queries,
    unpack_rows,
)
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.model.loader import load_model
from dycoke_core.sequence import Sequence, Stage, TokenEvent
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

POLICIES: list[str | dict[str, object]] = [
    "full",
    "dycoke",
    {"policy": "dycoke", "l": 0, "p": 0.5},
    {"policy": "dycoke", "threshold": 1.0},  # selects at every step
    "dycoke_one_shot",
    "random_kv",
    "lowest_kv",
]


@pytest.fixture(scope="module")
def cuda_model(random_checkpoint: Path) -> Iterator[LlavaOnevision]:
    yield load_model(random_checkpoint, device="cuda", dtype="float32")


def sequences(*, num_videos: int = len(POLICIES), max_tokens: int = 12) -> list[Sequence]:
    """One of each policy."""
    return [
        make_sequence(
            f"{index}", video=index % num_videos, compression=policy, max_tokens=max_tokens
        )
        for index, policy in enumerate(POLICIES)
    ]


def engine_on(model: LlavaOnevision, **settings: object) -> RecordingEngine:
    config = EngineConfig(device=str(model.device), kv_cache_bytes=2**30, **settings)  # type: ignore[arg-type]
    return RecordingEngine(model, config)


def assert_same_answers(found: RecordingEngine, expected: RecordingEngine) -> None:
    """Logits within the bound, kept sets and refreshes exactly."""
    assert found.recordings.keys() == expected.recordings.keys()
    for name, reference in expected.recordings.items():
        mine = found.recordings[name]
        assert_same_logits(to_cpu(mine.logits), to_cpu(reference.logits))
        assert_same_kept(to_cpu(mine.kept), to_cpu(reference.kept))
        assert mine.refreshes == reference.refreshes


def to_cpu(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.cpu() for tensor in tensors]


# --- the CPU's answers ---


@pytest.mark.parametrize("dp_cache", ["device", "host"])
def test_a_mixed_batch_gives_the_cpus_logits_and_kept_sets(
    dp_cache: str, cuda_model: LlavaOnevision, engine: RecordingEngine
) -> None:
    on_cuda = engine_on(cuda_model, dp_cache=dp_cache)
    found, expected = on_cuda.run(*sequences()), engine.run(*sequences())
    assert_same_answers(on_cuda, engine)
    assert token_ids(found) == token_ids(expected)
    assert on_cuda.stats().kv_bytes_in_use == 0


def test_questions_about_one_video_give_the_cpus_logits_and_kept_sets(
    cuda_model: LlavaOnevision, engine: RecordingEngine
) -> None:
    on_cuda = engine_on(cuda_model)
    on_cuda.run(*sequences(num_videos=1))
    engine.run(*sequences(num_videos=1))
    assert_same_answers(on_cuda, engine)


def test_drawn_answers_are_the_cpus(cuda_model: LlavaOnevision, engine: RecordingEngine) -> None:
    def drawn() -> list[Sequence]:
        return [
            make_sequence(f"{seed}", video=1, seed=seed, temperature=0.8, top_p=0.9)
            for seed in range(6)
        ]

    found, expected = engine_on(cuda_model).run(*drawn()), engine.run(*drawn())
    assert token_ids(found) == token_ids(expected)


def token_ids(events: dict[str, list[TokenEvent]]) -> dict[str, list[int]]:
    for answer in events.values():
        assert answer[-1].error is None and answer[-1].report is not None
    return {name: [i for e in answer for i in e.token_ids] for name, answer in events.items()}


@pytest.mark.parametrize("batch", [2, 3, 17])
def test_an_answer_in_a_batch_is_that_of_an_answer_alone(
    batch: int, cuda_model: LlavaOnevision
) -> None:
    """Batches at a bucket's size and between two, with rows that pad them."""

    def sequence(index: int) -> Sequence:
        policy = POLICIES[index % len(POLICIES)]
        return make_sequence(f"{index}", video=index % 5, compression=policy, max_tokens=6)

    together, alone = engine_on(cuda_model), engine_on(cuda_model)
    together.run(*(sequence(index) for index in range(batch)))
    for index in range(batch):
        alone.run(sequence(index))
    assert_same_answers(together, alone)


def test_a_replayed_answer_goes_on_as_it_would_have(cuda_model: LlavaOnevision) -> None:
    whole, resumed = engine_on(cuda_model), engine_on(cuda_model)
    first = token_ids(whole.run(make_sequence("a", max_tokens=12)))["a"]
    second = resumed.run(make_sequence("a", max_tokens=12, forced=tuple(first[:5])))
    assert token_ids(second)["a"] == first[5:]
    assert_same_logits(
        to_cpu(resumed.recordings["a"].logits), to_cpu(whole.recordings["a"].logits[5:])
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_through_and_stays_finite(dtype: str, random_checkpoint: Path) -> None:
    model = load_model(random_checkpoint, device="cuda", dtype=dtype)
    engine = engine_on(model)
    events = engine.run(*sequences())
    assert all(ends[-1].report is not None for ends in events.values())
    assert all(torch.isfinite(row).all() for r in engine.recordings.values() for row in r.logits)


# --- graphs and waits ---


def test_replayed_graphs_do_what_eager_steps_do(cuda_model: LlavaOnevision) -> None:
    replayed, eager = engine_on(cuda_model), engine_on(cuda_model)
    eager.backend.release_idle_memory()  # drops the graphs for the next 64 steps
    replayed.run(*sequences())
    eager.run(*sequences())
    assert_same_answers(replayed, eager)


def test_graphs_are_captured_again_after_memory_ran_out(cuda_model: LlavaOnevision) -> None:
    engine = engine_on(cuda_model)
    engine.backend.release_idle_memory()
    events = engine.run(*sequences(max_tokens=100))  # more steps than stay eager
    expected = engine_on(cuda_model).run(*sequences(max_tokens=100))
    assert token_ids(events) == token_ids(expected)


def test_the_same_batch_twice_gives_the_same_bits(cuda_model: LlavaOnevision) -> None:
    first, second = engine_on(cuda_model), engine_on(cuda_model)
    first.run(*sequences())
    second.run(*sequences())
    for name, recording in first.recordings.items():
        pairs = zip(recording.logits, second.recordings[name].logits, strict=True)
        assert all(torch.equal(mine, other) for mine, other in pairs)


def decode_until_steady(engine: Engine, decoding: list[Sequence]) -> None:
    for sequence in decoding:
        engine.add(sequence)
    while any(sequence.stage is not Stage.DECODING for sequence in decoding):
        engine.step()
    for _ in range(3):
        engine.step()


@pytest.mark.parametrize("has_graphs", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_decode_step_never_waits_for_the_device(
    temperature: float, has_graphs: bool, cuda_model: LlavaOnevision
) -> None:
    """Except for the previous step's event, which torch does not count as a wait."""
    config = EngineConfig(device="cuda", kv_cache_bytes=2**30)
    engine = Engine(cuda_model, config)  # a recording one would look at the device
    if not has_graphs:
        engine.backend.release_idle_memory()
    decoding = [
        make_sequence(f"{i}", video=i, compression=policy, max_tokens=40, temperature=temperature)
        for i, policy in enumerate(POLICIES)
    ]
    decode_until_steady(engine, decoding)
    torch.cuda.set_sync_debug_mode("error")
    try:
        events = [event for _ in range(5) for event in engine.step()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(events) >= 4 * len(decoding) and all(event.error is None for event in events)


# --- memory ---


def test_a_dp_cache_on_the_host_frees_device_memory(cuda_model: LlavaOnevision) -> None:
    held = {}
    for place in ("device", "host"):
        engine = engine_on(cuda_model, dp_cache=place)
        sequence = make_sequence(num_frames=32, compression="dycoke", max_tokens=30)
        engine.add(sequence)
        while sequence.stage is not Stage.DECODING:
            engine.step()
        held[place] = engine.stats().kv_bytes_in_use
        engine.abort("a")
        engine.clear_caches()
    assert held["host"] < 0.75 * held["device"]  # half of the layers stay, and the kept rows


def test_all_device_memory_of_sequences_comes_back(cuda_model: LlavaOnevision) -> None:
    engine = engine_on(cuda_model)
    allocated = []
    for _ in range(4):
        engine.run(*sequences())
        engine.clear_caches()
        engine.recordings.clear()
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
        assert engine.backend.allocated_bytes() == 0
        engine.backend.check(num_prefixes=0)
    assert allocated[-1] <= allocated[1]


def test_an_engine_that_goes_gives_all_its_memory_back(cuda_model: LlavaOnevision) -> None:
    before = memory_allocated()
    for _ in range(2):
        engine = engine_on(cuda_model)
        engine.run(*sequences())
        del engine
    assert memory_allocated() - before < 2**26  # far less than a pool


def memory_allocated() -> int:
    """By what is in use: without garbage, and without cuBLAS's workspaces, one for each stream."""
    torch.cuda.synchronize()
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def test_an_abort_in_mid_decode_leaves_the_others_answers(cuda_model: LlavaOnevision) -> None:
    undisturbed, disturbed = engine_on(cuda_model), engine_on(cuda_model)
    undisturbed.run(*sequences()[1:])
    batch = sequences()
    decode_until_steady(disturbed, batch)
    disturbed.abort(batch[0].sequence_id)
    disturbed.drain()
    for name, recording in undisturbed.recordings.items():
        mine = disturbed.recordings[name]
        assert_same_logits(to_cpu(mine.logits), to_cpu(recording.logits))


# --- PyTorch's fused attention, which prompts use ---


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
