"""What a worker's metrics make of its engine's counts."""

from dataclasses import replace

from prometheus_client import CollectorRegistry

from app.metrics import WorkerMetrics
from dycoke_core.engine_card import EngineStats

STATS = EngineStats(
    num_waiting=0,
    num_running=1,
    kv_bytes_in_use=0,
    kv_bytes_cached=0,
    kv_bytes_budget=1,
    device_memory_bytes=0,
)


def test_preemptions_are_counted_once_each_by_the_priority_of_who_came() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, model="tiny")

    def count(priority: str) -> float | None:
        labels = {"model": "tiny", "priority": priority}
        return registry.get_sample_value("dycoke_preemptions_total", labels)

    assert (count("high"), count("normal")) == (0, 0), "there before the first one"
    metrics.set_engine(STATS)
    for _ in range(2):
        metrics.set_engine(replace(STATS, num_preemptions={"high": 2}))
    metrics.set_engine(replace(STATS, num_preemptions={"high": 3, "normal": 1}))
    assert (count("high"), count("normal")) == (3, 1)
