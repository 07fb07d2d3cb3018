"""Prometheus metrics: what a worker's engine did, and what the API's clients saw.

No metric is in both sets, so sums over both kinds of processes count nothing twice. Labels never
contain job ids. Each process has one registry and one port.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Summary,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from app.errors import error_codes
from app.messages import CacheUse, CompressionChoice, CompressionReceipt, DoneEvent
from dycoke_core.config import PRIORITIES, Priority
from dycoke_core.engine_card import EngineStats

# Otherwise each counter and histogram gets a second series that is never read.
disable_created_metrics()  # type: ignore[no-untyped-call]

# From a millisecond (compression on a GPU) to minutes (prefill on a CPU).
STAGE_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 300,
)  # fmt: skip

REQUEST_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
TOKEN_BUCKETS_S = (
    0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5,
)  # fmt: skip
RATIO_BUCKETS = tuple(n / 20 for n in range(1, 21))
BYTES_BUCKETS = tuple(float(2**n) for n in range(16, 40, 2))  # 64 KiB to 256 GiB
ERROR_BUCKETS_S = (-10, -5, -2, -1, -0.5, -0.2, -0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

# How a job ends, besides by an error's code.
DONE = "done"
CLIENT_DEADLINE_EXCEEDED = "client_deadline_exceeded"  # the request's own deadline has passed
ANY_KEY = "any"  # instead of a key's name, if the metrics must not show names
INTERRUPTED = "interrupted"  # this process was shut down before the job's end
STAGES = ("upload", "read_frames", "queue", "vision", "compress", "prefill", "decode")
CACHES = ("frames", "features", "prefix")


Metric = TypeVar("Metric", Counter, Gauge, Histogram, Summary)


class RequestLabels(NamedTuple):
    """The labels of a request's metrics.

    Args:
        policy: the policy that answers; `auto` until a level is chosen.
        requested: `auto`, or `fixed` if the request or the server's default names the policy.
    """

    model: str
    policy: str
    requested: str


class _Children:
    """Caches a metric's series by their labels: looking one up costs more than observing it."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Any] = {}

    def __call__(self, metric: Metric, *labels: str) -> Metric:
        key = (metric, *labels)
        child: Metric | None = self._known.get(key)
        if child is None:
            child = self._known[key] = metric.labels(*labels)
        return child


class WorkerMetrics:
    """What the engine of one worker did."""

    def __init__(self, registry: CollectorRegistry, *, model: str) -> None:
        self._model = model
        self._child = _Children()

        def gauge(name: str, text: str) -> Gauge:
            metric = Gauge(f"dycoke_{name}", text, ["model"], registry=registry)
            return metric.labels(model)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"dycoke_{name}", text, ["model", *labels], registry=registry)

        self._stage_seconds = Histogram(
            "dycoke_stage_seconds",
            "Time that finished jobs spent in each stage of their last attempt.",
            ["model", "policy", "stage"],
            buckets=STAGE_BUCKETS_S,
            registry=registry,
        )
        self._requests_running = gauge("requests_running", "Sequences that the engine advances.")
        self._requests_waiting = gauge("requests_waiting", "Sequences waiting in the engine.")
        self._requests_capacity = gauge(
            "requests_capacity",
            "Jobs that the worker takes at a time; 0 while it loads its model and while it drains.",
        )
        self._kv_cache_usage_ratio = gauge(
            "kv_cache_usage_ratio",
            "KV bytes that running sequences hold, as a share of the budget.",
        )
        self._device_memory_bytes = gauge(
            "device_memory_bytes", "Bytes allocated on the device; 0 on a CPU."
        )
        self._visual_tokens = counter(
            "visual_tokens",
            "Visual tokens of finished jobs: from the vision tower, in the prefill, and in the "
            "pruned layers of a decode step.",
            "policy",
            "stage",
        )
        self._prompt_tokens = counter(
            "prompt_tokens", "Prompt tokens of finished jobs, visual ones included.", "policy"
        )
        self._generation_tokens = counter("generation_tokens", "Tokens generated.", "policy")
        self._cache_hits = counter(
            "cache_hits", "Finished jobs that found what they need in the cache.", "cache"
        )
        self._cache_misses = counter(
            "cache_misses", "Finished jobs that did not find it in the cache.", "cache"
        )
        for cache in CACHES:
            self._cache_hits.labels(model, cache)
            self._cache_misses.labels(model, cache)
        self._lease_reclaims = counter(
            "lease_reclaims", "Jobs taken over from workers that died, failed or drained."
        ).labels(model)
        self._kv_refreshes = counter(
            "kv_refreshes", "Decode steps that selected their visual tokens again.", "policy"
        )
        self._flops = counter(
            "flops",
            "FLOPs of finished jobs, counted exactly: actual, and with full tokens.",
            "policy",
            "kind",
        )

        self._preemptions = counter(
            "preemptions",
            "Low-priority sequences that were paused, by the priority of the one that needed room.",
            "priority",
        )
        self._num_preemptions: dict[Priority, int] = {}  # of those, counted so far
        for priority in PRIORITIES[:-1]:
            self._preemptions.labels(model, priority)
        self._auto_choices = counter(
            "auto_choices", "Levels that policy `auto` chose, and why.", "level", "reason"
        )
        self._auto_objectives = counter(
            "auto_objectives",
            "Jobs of policy `auto` that finished or reached their deadline, by whether their first "
            "token met the objective.",
            "met",
        )
        self._auto_prediction_error = Histogram(
            "dycoke_auto_prediction_error_seconds",
            "Time to first token of a job of policy `auto`, minus the prediction.",
            ["model"],
            buckets=ERROR_BUCKETS_S,
            registry=registry,
        ).labels(model)
        for met in ("true", "false"):
            self._auto_objectives.labels(model, met)

    def count_choice(self, choice: CompressionChoice) -> None:
        self._auto_choices.labels(self._model, str(choice.level), choice.reason).inc()

    def count_objective(self, *, is_met: bool) -> None:
        self._auto_objectives.labels(self._model, "true" if is_met else "false").inc()

    def count_generated(self, policy: str, num_tokens: int) -> None:
        self._child(self._generation_tokens, self._model, policy).inc(num_tokens)

    def set_capacity(self, *, running_jobs: int) -> None:
        self._requests_capacity.set(running_jobs)

    def count_reclaim(self) -> None:
        self._lease_reclaims.inc()

    def set_engine(self, stats: EngineStats) -> None:
        self._requests_running.set(stats.num_running)
        self._requests_waiting.set(stats.num_waiting)
        self._kv_cache_usage_ratio.set(stats.kv_bytes_in_use / max(stats.kv_bytes_budget, 1))
        self._device_memory_bytes.set(stats.device_memory_bytes)
        for priority, number in stats.num_preemptions.items():
            more = number - self._num_preemptions.get(priority, 0)
            self._child(self._preemptions, self._model, priority).inc(more)
            self._num_preemptions[priority] = number

    def observe_done(self, done: DoneEvent) -> None:
        """Takes over what a finished job's receipt says."""
        model, policy, timings = self._model, done.policy_label, done.timings_s
        for stage in STAGES:
            seconds = self._child(self._stage_seconds, model, policy, stage)
            seconds.observe(getattr(timings, stage))
        self._child(self._prompt_tokens, model, policy).inc(done.usage.prompt_tokens)
        if (auto := done.compression.auto) is not None:
            self.count_objective(is_met=timings.ttft <= auto.objective_s)
            self._auto_prediction_error.observe(timings.ttft - auto.predicted_ttft_s)
        if done.cache is not None:
            self._observe_video(policy, done.compression, done.cache)

    def _observe_video(self, policy: str, receipt: CompressionReceipt, cache_use: CacheUse) -> None:
        """What only a job with a video has."""
        model = self._model
        for stage, count in (
            ("input", receipt.visual_tokens_in),
            ("prefill", receipt.visual_tokens_prefill),
            ("decode", receipt.visual_tokens_decode),
        ):
            self._child(self._visual_tokens, model, policy, stage).inc(count)
        self._child(self._kv_refreshes, model, policy).inc(receipt.refreshes)
        self._child(self._flops, model, policy, "actual").inc(receipt.flops.exact.actual)
        self._child(self._flops, model, policy, "full").inc(receipt.flops.exact.full)
        for cache in CACHES:
            is_hit = getattr(cache_use, cache) == "hit"
            counter = self._cache_hits if is_hit else self._cache_misses
            self._child(counter, model, cache).inc()


class ApiMetrics:
    """What the clients of one API process experienced, and what it sees of the queue.

    A job is observed once, by the process whose connection posted it.

    Args:
        names_keys: whether metrics may have keys' names as labels.
    """

    def __init__(self, registry: CollectorRegistry, *, names_keys: bool = True) -> None:
        self.registry = registry
        self._child = _Children()
        self._names_keys = names_keys

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            names = [*RequestLabels._fields, *labels]
            return Histogram(f"dycoke_{name}", text, names, buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"dycoke_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"dycoke_{name}", text, labels, registry=registry)

        self._request_latency = histogram(
            "request_latency_seconds",
            "Time from acceptance to the end of the answer.",
            REQUEST_BUCKETS_S,
        )
        self._time_to_first_token = histogram(
            "time_to_first_token_seconds",
            "Time from acceptance to the first token.",
            REQUEST_BUCKETS_S,
        )
        self._inter_token_latency = histogram(
            "inter_token_latency_seconds",
            "Time between the arrivals of two tokens at the API.",
            TOKEN_BUCKETS_S,
        )
        self._retained_token_ratio = histogram(
            "retained_token_ratio",
            "Visual tokens kept, as a share of all visual tokens of the frames.",
            RATIO_BUCKETS,
            "stage",
        )
        self._request_kv_bytes = histogram(
            "request_kv_bytes", "KV cache in use at the end of an answer.", BYTES_BUCKETS
        )
        self._request_kv_bytes_full_tokens = Summary(
            "dycoke_request_kv_bytes_full_tokens",
            "KV cache that the same answer would have filled with full tokens.",
            RequestLabels._fields,
            registry=registry,
        )
        self._request_peak_memory_bytes = histogram(
            "request_peak_memory_bytes",
            "Peak memory on the device while a job ran; on a CPU the worker's peak RSS.",
            BYTES_BUCKETS,
        )
        self._requests = counter(
            "requests",
            "Jobs by how they ended: done, interrupted (by this process' shutdown), "
            "client_deadline_exceeded (past the `deadline_s` of the request), or a code.",
            *RequestLabels._fields,
            "outcome",
        )
        self._rejections = counter(
            "rejections", "Posts refused before they became a job, by error code.", "reason"
        )
        self._key_refusals = counter(
            "key_refusals",
            "Posts refused because their key has reached one of its limits, by limit.",
            "key",
            "limit",
        )
        self._key_jobs = gauge(
            "key_jobs",
            "Jobs under way, by key: waiting (for frames or a worker) or running.",
            "key",
            "state",
        )
        self._stream_resumes = counter(
            "stream_resumes", "Event streams resumed with Last-Event-ID."
        )
        self._client_disconnects = counter(
            "client_disconnects", "Connections that posted a job and closed before its end."
        )
        self._open_streams = gauge(
            "open_streams", "Answers that clients are waiting for or reading."
        )
        self._frame_readings = gauge("reader_jobs", "Jobs whose frames this process reads.")
        self._queue_depth = gauge("queue_depth", "Jobs accepted that no worker has taken.", "model")
        self._queue_places = gauge(
            "queue_places", "Places that waiting jobs take; a large job takes several.", "model"
        )
        self._queue_oldest_age = gauge(
            "queue_oldest_age_seconds",
            "Time since the acceptance of the oldest queued job.",
            "model",
        )
        self._workers_alive = gauge("workers_alive", "Workers that can take jobs.", "model")
        self._store_up = gauge(
            "store_up", "1 while Redis answers this process, which asks every second; else 0."
        )
        self._queue_capacity = gauge(
            "queue_capacity", "Places; beyond them only keys below their share are accepted."
        )
        self._stream_capacity = gauge("stream_capacity", "Answers that may be open at a time.")
        self._event_loop_lag = Histogram(
            "dycoke_event_loop_lag_seconds",
            "Delay with which the event loop runs what is due, sampled continuously.",
            buckets=LAG_BUCKETS_S,
            registry=registry,
        )
        # A counter that appears with its first event loses that event to rate() and increase().
        self._outcomes = (DONE, INTERRUPTED, CLIENT_DEADLINE_EXCEEDED, *error_codes())
        self._known_requests: set[RequestLabels] = set()
        for reason in error_codes():
            self._rejections.labels(reason)

    def observe_done(self, done: DoneEvent) -> None:
        """Takes over what a finished job's receipt says."""
        labels = RequestLabels(done.model, done.policy_label, done.requested_label)
        self._child(self._request_latency, *labels).observe(done.timings_s.total)
        self._child(self._time_to_first_token, *labels).observe(done.timings_s.ttft)
        kept, ratio = self._retained_token_ratio, done.compression.retained_ratio
        if ratio is not None:
            self._child(kept, *labels, "prefill").observe(ratio.prefill)
            self._child(kept, *labels, "decode").observe(ratio.decode)
        memory = done.memory
        self._child(self._request_kv_bytes, *labels).observe(memory.kv_bytes)
        full = self._child(self._request_kv_bytes_full_tokens, *labels)
        full.observe(memory.kv_bytes_full_tokens)
        peak = self._child(self._request_peak_memory_bytes, *labels)
        peak.observe(memory.peak_device_bytes)

    def token_gaps(self, labels: RequestLabels) -> Callable[[float], None]:
        """Returns a function that takes each gap, in seconds: a label look-up per gap would cost as
        much again."""
        observe: Callable[[float], None] = self._inter_token_latency.labels(*labels).observe
        return observe

    def expect_request(self, labels: RequestLabels) -> None:
        """Creates the counters of all ways in which a job may end, at 0."""
        if labels not in self._known_requests:
            self._known_requests.add(labels)
            for outcome in self._outcomes:
                self._requests.labels(*labels, outcome)

    def count_request(self, labels: RequestLabels, outcome: str) -> None:
        self._child(self._requests, *labels, outcome).inc()

    def key_label(self, name: str) -> str:
        return name if self._names_keys else ANY_KEY

    def count_key_refusal(self, name: str, limit: str) -> None:
        self._key_refusals.labels(self.key_label(name), limit).inc()

    def set_key_jobs(self, label: str, *, waiting: int, running: int) -> None:
        self._key_jobs.labels(label, "waiting").set(waiting)
        self._key_jobs.labels(label, "running").set(running)

    def count_rejection(self, reason: str) -> None:
        self._rejections.labels(reason).inc()

    def count_resume(self) -> None:
        self._stream_resumes.inc()

    def count_disconnect(self) -> None:
        self._client_disconnects.inc()

    def observe_lag(self, lag_s: float) -> None:
        self._event_loop_lag.observe(lag_s)

    def set_capacity(self, *, queued_jobs: int, streams: int) -> None:
        self._queue_capacity.set(queued_jobs)
        self._stream_capacity.set(streams)

    def set_open_streams(self, count: int) -> None:
        self._open_streams.set(count)

    def set_frame_readings(self, count: int) -> None:
        self._frame_readings.set(count)

    def set_queue(
        self, model: str, *, depth: int, places: int, oldest_age_s: float, num_workers: int
    ) -> None:
        self._queue_depth.labels(model).set(depth)
        self._queue_places.labels(model).set(places)
        self._queue_oldest_age.labels(model).set(oldest_age_s)
        self._workers_alive.labels(model).set(num_workers)

    def set_store_up(self, is_up: bool) -> None:
        self._store_up.set(is_up)

    def watch_readers(
        self, kills: Callable[[], Mapping[str, int]], num_exceptions: Callable[[], int]
    ) -> None:
        """Exports the frame readers' own counts of children that were killed, by reason, and that
        failed.
        """
        self.registry.register(_LostReaders(kills, num_exceptions))


class _LostReaders(Collector):
    def __init__(
        self, kills: Callable[[], Mapping[str, int]], num_exceptions: Callable[[], int]
    ) -> None:
        self._kills = kills
        self._num_exceptions = num_exceptions

    def collect(self) -> list[CounterMetricFamily]:
        killed = CounterMetricFamily(
            "dycoke_reader_kills", "Frame readers that were killed.", labels=["reason"]
        )
        for reason, count in sorted(self._kills().items()):
            killed.add_metric([reason], count)
        failed = CounterMetricFamily(
            "dycoke_reader_exceptions", "Frame readers that ended in an exception."
        )
        failed.add_metric([], self._num_exceptions())
        return [killed, failed]
