"""What the device does during decode steps: how much of the time it works, and on how many kernels.

Kernel times come from torch.profiler. A profiled step takes longer on the host, so the busy share
is kernel time per profiled step over the wall clock of an unprofiled one; the share within the
profiled window is reported too. Runs after everything that is timed: what the profiler attaches to
the process may stay.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile

from dycoke_core.engine import Engine
from loadtest.gpu.kit import Kit
from loadtest.gpu.timing import DeviceTimer, synchronize, time_steps
from loadtest.gpu.workbench import Compression, Workbench

_HOST_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync")
_NUM_TOP = 15


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """The device's work in some steps. busy_us: of the union of intervals; overlap counts once."""

    busy_us: float
    span_us: float  # from the first start to the last end
    num_activities: int  # kernels, copies and fills on the device
    host_calls: Counter[str]
    by_name: Counter[str]  # µs


def measure_busy(kit: Kit) -> None:
    bench, batch = kit.bench("large"), kit.sizes.batch
    full, dycoke = bench.policies.full, bench.policies.dycoke
    cases = {"full_b64": (full, batch), "dycoke_b64": (dycoke, batch), "dycoke_b1": (dycoke, 1)}
    for name, (compression, size) in cases.items():
        _measure(kit, bench, name, compression, size)
    share = kit.report.figures.get("busy_share_dycoke_b64")
    if share is not None:
        kit.report.record("busy_share", share.value, note="dycoke, batch 64")


def _measure(kit: Kit, bench: Workbench, name: str, compression: Compression, batch: int) -> None:
    num_steps, report = kit.sizes.num_steps // 2 or 1, kit.report
    with bench.decoding(compression, batch, num_steps=3 * num_steps):
        times = time_steps(bench.engine, num_steps)
        if kit.device.type == "cuda":
            with DeviceTimer() as timer:
                for _ in range(num_steps):
                    bench.engine.step()
            synchronize(kit.device)
            event_ms = timer.seconds() / num_steps * 1e3
            report.record(f"event_ms_{name}", event_ms, "ms", note="per step, by device events")
        work = _profile(bench.engine, num_steps)
    report.record(f"step_ms_{name}", times.mean_s * 1e3, "ms", note="per step, by wall clock")
    report.detail(f"host calls per step, {name}", _per_step(work.host_calls, num_steps))
    report.detail(f"µs per step by kernel, {name}", _per_step(work.by_name, num_steps))
    if not work.num_activities:
        report.note(f"{name}: the profiler saw no work on a device")
        return
    launches = sum(n for call, n in work.host_calls.items() if call.startswith(_HOST_LAUNCHES))
    report.record(f"kernels_{name}", work.num_activities / num_steps, "per step")
    report.record(f"host_launches_{name}", launches / num_steps, "per step")
    busy = work.busy_us / num_steps / (times.mean_s * 1e6)
    report.record(f"busy_share_{name}", min(busy, 1.0), "share")
    report.record(
        f"busy_share_profiled_{name}", work.busy_us / work.span_us, "share", note="in the window"
    )


def _per_step(counts: Counter[str], num_steps: int) -> dict[str, float]:
    return {name: value / num_steps for name, value in counts.most_common(_NUM_TOP)}


def _profile(engine: Engine, num_steps: int) -> DeviceWork:
    device = engine.model.device
    is_cuda = device.type == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as found:
        for _ in range(num_steps):
            engine.step()
        synchronize(device)
    return device_work(found.events() or ())


def device_work(events: Iterable[Any]) -> DeviceWork:
    """Sums up the profiler's events: those on the device, and the calls that launched them."""
    intervals: list[tuple[float, float]] = []
    host_calls: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    for event in events:
        if event.device_type.name == "CPU":
            if event.name.startswith("cu"):
                host_calls[event.name] += 1
        elif not getattr(event, "is_user_annotation", False):
            intervals.append((event.time_range.start, event.time_range.end))
            by_name[event.name] += event.time_range.end - event.time_range.start
    busy, span = _union(sorted(intervals))
    return DeviceWork(busy, span, len(intervals), host_calls, by_name)


def _union(intervals: list[tuple[float, float]]) -> tuple[float, float]:
    """Length covered by sorted intervals, and length from end to end."""
    if not intervals:
        return 0.0, 0.0
    covered, reached = 0.0, intervals[0][0]
    for begin, end in intervals:
        covered += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return covered, reached - intervals[0][0]
