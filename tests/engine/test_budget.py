"""How much memory an engine takes for its KV cache where no setting says so."""

from pathlib import Path

import pytest

from dycoke_core.config import Batching, EngineConfig
from dycoke_core.engine import budget
from dycoke_core.engine.budget import (
    available_bytes,
    cpu_kv_budget_bytes,
    gpu_kv_budget_bytes,
    host_budget_bytes,
    pass_bytes,
    vision_bytes,
)
from dycoke_core.model.llava_onevision import LlavaOnevision

GIB = 2**30
GROUP_2 = ("memory.max", "memory.current", "memory.stat")
GROUP_1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")


def machine(root: Path, *, available: int) -> Path:
    (root / "proc").mkdir()
    kilobytes = available // 1024
    (root / "proc/meminfo").write_text(f"MemFree: 7 kB\nMemAvailable:   {kilobytes} kB\n")
    return root


def limit_group(root: Path, names: tuple[str, str, str], values: tuple[str, int, int]) -> None:
    limit, used, page_cache = values
    texts = (limit, str(used), f"anon 5\ninactive_file {page_cache}\n")
    for name, text in zip(names, texts, strict=True):
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_page_cache_is_available(tmp_path: Path) -> None:
    assert available_bytes(machine(tmp_path, available=40 * GIB)) == 40 * GIB


@pytest.mark.parametrize("names", [GROUP_2, GROUP_1])
def test_a_container_has_what_its_limit_leaves(names: tuple[str, str, str], tmp_path: Path) -> None:
    root = machine(tmp_path, available=40 * GIB)
    limit_group(root, names, (str(8 * GIB), 3 * GIB, 1 * GIB))
    assert available_bytes(root) == 6 * GIB


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("max", 3 * GIB, 0), 40 * GIB),  # no limit
        ((str(90 * GIB), 3 * GIB, 0), 40 * GIB),  # more than there is
        ((str(2 * GIB), 3 * GIB, 0), 0),  # a limit that was lowered under what is used
    ],
)
def test_a_limit_never_adds_memory(
    values: tuple[str, int, int], expected: int, tmp_path: Path
) -> None:
    root = machine(tmp_path, available=40 * GIB)
    limit_group(root, GROUP_2, values)
    assert available_bytes(root) == expected


def test_engines_on_a_cpu_share_a_quarter_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "available_bytes", lambda: 8 * GIB)
    assert cpu_kv_budget_bytes(EngineConfig(engines_per_device=2)) == GIB
    monkeypatch.setattr(budget, "available_bytes", lambda: 400 * GIB)
    assert cpu_kv_budget_bytes(EngineConfig()) == 8 * GIB
    assert cpu_kv_budget_bytes(EngineConfig(kv_cache_bytes=5)) == 5


def test_engines_on_a_host_share_a_quarter_of_it_for_the_dp_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget, "available_bytes", lambda: 64 * GIB)
    assert host_budget_bytes(EngineConfig(engines_per_host=4)) == 4 * GIB
    assert host_budget_bytes(EngineConfig(engines_per_host=4, host_cache_bytes=7)) == 7


def test_a_pass_takes_more_with_larger_chunks(tiny_model: LlavaOnevision) -> None:
    row = (3 * 512 + 8 * 256) * 4  # the bundled shape, float32
    batching = Batching(max_running_sequences=8, prefill_chunk_tokens=1000, vision_batch_frames=4)
    assert pass_bytes(tiny_model, batching) == (1000 + 512 + 8) * row


def test_a_gpu_sets_aside_what_passes_features_and_the_vision_tower_take(
    tiny_model: LlavaOnevision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (100 * GIB, 140 * GIB))
    batching = Batching(max_running_sequences=8, prefill_chunk_tokens=1000, vision_batch_frames=32)
    config = EngineConfig(feature_cache_bytes=GIB)
    taken = pass_bytes(tiny_model, batching) + vision_bytes(tiny_model, config, batching)
    assert gpu_kv_budget_bytes(tiny_model, config, batching) == 84 * GIB - taken
