"""What the engines do: places, memory, caches, and where an answer's time goes."""

from deploy.grafana.panels import (
    Board,
    Query,
    Row,
    Variable,
    bars,
    graph,
    mean,
    number,
    quantile,
    rate,
)

W = '{model=~"$model", instance=~"$instance"}'
PROCESS = '{job="dycoke-worker", instance=~"$instance"}'
STAGES = ("upload", "read_frames", "queue", "vision", "compress", "prefill", "decode")


def _stage(stage: str) -> str:
    return f'{{model=~"$model", instance=~"$instance", stage="{stage}"}}'


def _each(metric: str) -> list[Query]:
    return [Query(f"sum by (instance) ({metric}{W})", "{{instance}}")]


def _hits(cache_use: str) -> str:
    return rate(f"dycoke_cache_{cache_use}_total", W, "cache")


_now = Row(
    "Now",
    [
        number(
            "Running", "Sequences that engines advance.", "none", f"sum(dycoke_requests_running{W})"
        ),
        number(
            "Waiting",
            "Sequences waiting inside an engine.",
            "none",
            f"sum(dycoke_requests_waiting{W})",
        ),
        number(
            "Places", "Jobs that all workers may hold.", "none", f"sum(dycoke_requests_capacity{W})"
        ),
        number(
            "KV use, fullest worker",
            "Of its budget.",
            "percentunit",
            f"max(dycoke_kv_cache_usage_ratio{W})",
        ),
        number(
            "Tokens generated", "Per second.", "none", rate("dycoke_generation_tokens_total", W)
        ),
        number(
            "Leases reclaimed in the time shown",
            "Jobs taken over from workers that died or drained.",
            "none",
            f"sum(increase(dycoke_lease_reclaims_total{W}[$__range]))",
        ),
    ],
)

_load = Row(
    "Load",
    [
        graph("Running", "Per worker.", "none", _each("dycoke_requests_running")),
        graph(
            "Waiting",
            "In an engine, for room in its KV cache.",
            "none",
            _each("dycoke_requests_waiting"),
        ),
        graph(
            "KV use",
            "Share of the budget.",
            "percentunit",
            _each("dycoke_kv_cache_usage_ratio"),
            top=1,
        ),
        graph(
            "Preemptions",
            "Answers of low priority that made room in a KV cache, per second, for whom.",
            "cps",
            [Query(rate("dycoke_preemptions_total", W, "priority"), "{{priority}}")],
        ),
        graph(
            "Tokens generated",
            "Per second.",
            "none",
            [Query(rate("dycoke_generation_tokens_total", W, "instance"), "{{instance}}")],
        ),
        graph(
            "Prompt tokens",
            "Of finished jobs, per second, by policy.",
            "none",
            [Query(rate("dycoke_prompt_tokens_total", W, "policy"), "{{policy}}")],
        ),
        graph(
            "Lease reclaims",
            "Jobs taken over from workers that died or drained, per second.",
            "cps",
            [Query(rate("dycoke_lease_reclaims_total", W, "instance"), "{{instance}}")],
        ),
    ],
)

_stages = Row(
    "Where an answer's time goes",
    [
        bars(
            "Stages of an answer",
            "Mean seconds, in the order in which they happen.",
            "s",
            [Query(mean("dycoke_stage_seconds", _stage(stage)), stage) for stage in STAGES],
        ),
        graph(
            "Stages over time",
            "Mean seconds of a finished job; shared work counts for each that waits for it.",
            "s",
            [Query(mean("dycoke_stage_seconds", _stage(stage)), stage) for stage in STAGES],
            is_stacked=True,
        ),
        graph(
            "Stages, p95",
            "Tails: a slow queue is load, a slow stage is the engine.",
            "s",
            [Query(quantile(0.95, "dycoke_stage_seconds", W, "stage"), "{{stage}}")],
        ),
    ],
)

_memory = Row(
    "Caches and memory",
    [
        graph(
            "Cache hits",
            "Share of finished jobs that found their frames, features and prompt prefix.",
            "percentunit",
            [Query(f"{_hits('hits')} / ({_hits('hits')} + {_hits('misses')})", "{{cache}}")],
            top=1,
        ),
        graph(
            "Device memory",
            "Allocated on the GPU; 0 on a CPU.",
            "bytes",
            _each("dycoke_device_memory_bytes"),
        ),
        graph(
            "Host memory",
            "Resident, per worker process.",
            "bytes",
            [Query(f"sum by (instance) (process_resident_memory_bytes{PROCESS})", "{{instance}}")],
        ),
        graph(
            "CPU",
            "Cores in use, per worker process.",
            "none",
            [Query(rate("process_cpu_seconds_total", PROCESS, "instance"), "{{instance}}")],
        ),
        graph(
            "Workers that can take jobs",
            "As the API sees them, against those that Prometheus reaches.",
            "none",
            [
                Query('max(dycoke_workers_alive{model=~"$model"})', "alive"),
                Query('sum(up{job="dycoke-worker"})', "scraped"),
            ],
        ),
    ],
)

BOARD = Board(
    uid="dycoke-workers",
    title="DyCoke: Workers",
    description="What the engines do, and what they hold.",
    variables=[
        Variable("model", "dycoke_requests_running"),
        Variable("instance", "dycoke_requests_running"),
    ],
    rows=[_now, _load, _stages, _memory],
)
