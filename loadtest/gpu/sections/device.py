"""The machine and its rates, with which other sections' figures are compared."""

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dycoke_core.compression.flops import TextGeometry
from loadtest.geometry import Geometry
from loadtest.gpu.kit import Kit
from loadtest.gpu.timing import device_seconds, synchronize

_QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw"
_QUERY += ",power.limit,temperature.gpu,memory.used,memory.total,mig.mode.current"
_NUM_LAUNCHES = 1000


def describe(kit: Kit) -> None:
    """Device, versions, clocks and power as found. Changes no setting."""
    report = kit.report
    report.machine["cuda"] = torch.version.cuda
    report.machine["variables"] = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("TRITON_", "PYTORCH_", "CUDA_", "NVIDIA_TF32"))
    }
    if kit.device.type == "cuda":
        report.machine["device"] = _device_properties(kit.device)
    report.machine["nvidia_smi"] = _nvidia_smi()
    report.note(str(report.machine.get("device", "no CUDA device: a dry run")))
    report.note(f"nvidia-smi: {report.machine['nvidia_smi']}")


def _device_properties(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }


def _nvidia_smi() -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "--id=0"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    return dict(zip(_QUERY.split(","), result.stdout.strip().split(", "), strict=False))


# --- ceilings ---


def measure_ceilings(kit: Kit) -> None:
    _measure_copies(kit)
    _measure_matmuls(kit)
    _measure_launches(kit)
    _measure_fetch(kit)


def _measure_copies(kit: Kit) -> None:
    num_bytes = kit.sizes.copy_bytes
    source = torch.empty(num_bytes, dtype=torch.uint8, device=kit.device).random_()
    target = torch.empty_like(source)
    rates = [2 * num_bytes / s / 1e9 for s in _samples(lambda: target.copy_(source), kit)]
    kit.report.record("copy_gb_s", rates, "GB/s", note="bytes read and bytes written")


def _samples(run: Callable[[], object], kit: Kit) -> list[float]:
    return [device_seconds(run, kit.device) for _ in range(3)]


def _measure_matmuls(kit: Kit) -> None:
    """Measures on random data: products of zeros run faster than real ones."""
    sizes, report = kit.sizes, kit.report
    for name, num_rows, width, outputs in _products(sizes.large, sizes.matmul_rows, sizes.batch):
        rows = torch.randn(num_rows, width, device=kit.device).to(sizes.dtype)
        weights = torch.randn(outputs, width, device=kit.device).to(sizes.dtype)
        flops = 2 * num_rows * width * outputs
        seconds = _samples(_product(rows, weights), kit)
        tflops = [flops / s / 1e12 for s in seconds]
        report.record(f"matmul_{name}_tflops", tflops, "TFLOP/s", note=f"{num_rows} rows")
        num_bytes = weights.nbytes + rows.nbytes + num_rows * outputs * weights.itemsize
        rates = [num_bytes / s / 1e9 for s in seconds]
        report.record(f"matmul_{name}_gb_s", rates, "GB/s")


def _product(rows: Tensor, weights: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.nn.functional.linear(rows, weights)


def _products(geometry: Geometry, prefill: int, decode: int) -> list[tuple[str, int, int, int]]:
    """Name, rows, inputs, outputs: merged gate and up, down, and the language head."""
    hidden, inner = geometry.hidden_size, geometry.intermediate_size
    return [
        ("prefill_gate_up", prefill, hidden, 2 * inner),
        ("prefill_down", prefill, inner, hidden),
        ("decode_gate_up", decode, hidden, 2 * inner),
        ("decode_down", decode, inner, hidden),
        ("decode_head", decode, hidden, geometry.vocab_size),
    ]


def _measure_launches(kit: Kit) -> None:
    """Measures launches of the smallest kernel: one by one, and as nodes of a CUDA graph."""
    report, number = kit.report, torch.zeros(1, device=kit.device)

    def launch() -> None:
        for _ in range(_NUM_LAUNCHES):
            number.add_(1)

    report.record("launch_eager_us", _microseconds(launch, kit), "µs", note="mean of 1000")
    if kit.device.type != "cuda":
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    report.record("launch_graph_us", _microseconds(graph.replay, kit), "µs", note="mean of 1000")
    single = torch.cuda.CUDAGraph()
    with torch.cuda.graph(single):
        number.add_(1)

    def replay_many() -> None:
        for _ in range(_NUM_LAUNCHES):
            single.replay()

    report.record("graph_replay_us", _microseconds(replay_many, kit), "µs", note="of one node")


def _microseconds(run: Callable[[], object], kit: Kit) -> list[float]:
    samples = []
    for _ in range(4):
        synchronize(kit.device)
        started_at = time.perf_counter()
        run()
        synchronize(kit.device)
        samples.append((time.perf_counter() - started_at) / _NUM_LAUNCHES * 1e6)
    return samples[1:]


def _measure_fetch(kit: Kit) -> None:
    """Measures fetching 256 token ids to pinned memory, until the host may read them."""
    is_cuda = kit.device.type == "cuda"
    ids = torch.arange(256, dtype=torch.int32, device=kit.device)
    host = torch.empty(256, dtype=torch.int32, pin_memory=is_cuda)
    samples = []
    for _ in range(100):
        synchronize(kit.device)
        started_at = time.perf_counter()
        host.copy_(ids, non_blocking=True)
        synchronize(kit.device)
        samples.append((time.perf_counter() - started_at) * 1e6)
    kit.report.record("fetch_256_ids_us", statistics.median(samples[10:]), "µs")


# --- what the model must cost at these rates ---


def decode_floor_seconds(
    kit: Kit, text: TextGeometry, batch: int, rows_per_layer: float
) -> float | None:
    """A decode step at the copy rate of this run; None if that was not measured.

    Args:
        rows_per_layer: cached tokens that a sequence reads, averaged over layers.
    """
    rate = kit.report.figures.get("copy_gb_s")
    if rate is None:
        return None
    head = text.head_size * (2 * text.num_heads + 2 * text.num_kv_heads)
    layer = text.hidden_size * (head + 3 * text.intermediate_size)
    weights = text.num_layers * layer + text.hidden_size * text.vocab_size
    row = 2 * text.num_layers * text.num_kv_heads * text.head_size
    numbers = weights + batch * rows_per_layer * row
    return numbers * kit.sizes.dtype.itemsize / (rate.value * 1e9)
