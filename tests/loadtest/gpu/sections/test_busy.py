"""What a device did, from the profiler's events."""

from collections import Counter
from types import SimpleNamespace

from loadtest.gpu.sections.busy import device_work


def test_overlapping_work_of_a_device_counts_once() -> None:
    def event(kind: str, name: str, start: float, end: float) -> SimpleNamespace:
        interval = SimpleNamespace(start=start, end=end)
        device = SimpleNamespace(name=kind)
        return SimpleNamespace(device_type=device, name=name, time_range=interval)

    work = device_work(
        [
            event("CUDA", "late", 30, 40),
            event("CUDA", "early", 0, 10),
            event("CUDA", "inside", 2, 4),
            event("CUDA", "across", 5, 15),
            event("CPU", "cudaGraphLaunch", 0, 1),
            event("CPU", "aten::add", 0, 1),
        ]
    )
    assert (work.busy_us, work.span_us, work.num_activities) == (25, 40, 4)
    assert work.host_calls == Counter({"cudaGraphLaunch": 1})
