"""The names of the metrics, which dashboards and alerts go by."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry

from app.metrics import WorkerMetrics

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
            "auto_choices",
            "auto_objectives",
            "auto_prediction_error_seconds",
        )
    }
