"""The names of the metrics, which dashboards and alerts go by; what some of them count."""

from collections.abc import Callable
from dataclasses import replace

from prometheus_client import CollectorRegistry

from app.metrics import WorkerMetrics
from tests.engine_stats import ONE_RUNNING

LEASE_S = 0.6


def check_names(make: Callable[[CollectorRegistry], object]) -> set[str]:
    registry = CollectorRegistry()
    make(registry)
    return {metric.name for metric in registry.collect()}


def test_metric_names_are_the_agreed_ones() -> None:
    names = check_names(lambda registry: WorkerMetrics(registry, model="m"))
    assert names == {
        f"dycoke_{name}"
        for name in (
            "stage_seconds",
            "requests_running",
            "requests_waiting",
            "kv_cache_usage_ratio",
            "device_memory_bytes",
            "visual_tokens",
            "prompt_tokens",
            "generation_tokens",
            "cache_hits",
            "cache_misses",
            "lease_reclaims",
            "kv_refreshes",
            "requests_capacity",
            "flops",
            "preemptions",
            "auto_choices",
            "auto_objectives",
            "auto_prediction_error_seconds",
        )
    }


def test_preemptions_are_counted_once_each_by_the_priority_of_who_came() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, model="tiny")

    def count(priority: str) -> float | None:
        labels = {"model": "tiny", "priority": priority}
        return registry.get_sample_value("dycoke_preemptions_total", labels)

    assert (count("high"), count("normal")) == (0, 0), "there before the first one"
    metrics.set_engine(ONE_RUNNING)
    for _ in range(2):
        metrics.set_engine(replace(ONE_RUNNING, num_preemptions={"high": 2}))
    metrics.set_engine(replace(ONE_RUNNING, num_preemptions={"high": 3, "normal": 1}))
    assert (count("high"), count("normal")) == (3, 1)


def test_an_engine_without_memory_for_keys_and_values_uses_none() -> None:
    """It refuses every request; that must not end its worker, too."""
    registry = CollectorRegistry()
    WorkerMetrics(registry, model="m").set_engine(replace(ONE_RUNNING, kv_bytes_budget=0))
    assert registry.get_sample_value("dycoke_kv_cache_usage_ratio", {"model": "m"}) == 0.0
