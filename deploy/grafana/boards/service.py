"""What clients experience: rate, errors, latency, and what limits the service."""

from deploy.grafana.panels import (
    RATE,
    Board,
    Query,
    Row,
    Variable,
    graph,
    mean,
    number,
    quantile,
    quantiles,
    rate,
)

M = '{model=~"$model"}'
API = '{job="dycoke-api"}'
TTFT = "dycoke_time_to_first_token_seconds"
ITL = "dycoke_inter_token_latency_seconds"
LATENCY = "dycoke_request_latency_seconds"
LAG = "dycoke_event_loop_lag_seconds"
# An instance is a port; its processes are distinguished by their slot.
PROCESS = ("instance", "process")
EACH = "{{instance}} #{{process}}"

_now = Row(
    "Now",
    [
        number("Workers", "Workers that can take a job.", "none", f"max(dycoke_workers_alive{M})"),
        number("Jobs ended", "Per second, by any end.", "reqps", rate("dycoke_requests_total", M)),
        number(
            "Errors",
            "Share of jobs that ended by the service's own fault, over five minutes.",
            "percentunit",
            f"max(dycoke:request_errors:ratio_rate5m{M})",
        ),
        number("First token, p95", "Since acceptance.", "s", quantile(0.95, TTFT, M)),
        number(
            "Oldest queued job",
            "Age since acceptance; reading frames is not queueing.",
            "s",
            f"max(dycoke_queue_oldest_age_seconds{M})",
        ),
        number("Open answers", "Streams and waiting posts.", "none", "sum(dycoke_open_streams)"),
    ],
)

_rate = Row(
    "Rate and errors",
    [
        graph(
            "Jobs by how they ended",
            "`done`, or the code that the client got. Cancelled jobs are not errors.",
            "reqps",
            [Query(f"{rate('dycoke_requests_total', M, 'outcome')} > 0", "{{outcome}}")],
            is_stacked=True,
        ),
        graph(
            "Error ratio",
            "Jobs that ended by the service's own fault; alerts above 5 %.",
            "percentunit",
            [Query(f"dycoke:request_errors:ratio_rate5m{M}", "{{model}}")],
        ),
        graph(
            "Rejections",
            "Posts refused before they became a job, the most frequent reasons. "
            "`queue_full` is load, `no_worker` and `store_unavailable` are outages.",
            "reqps",
            [
                Query(
                    f"topk(8, {rate('dycoke_rejections_total', '', 'reason')})",
                    "{{reason}}",
                )
            ],
        ),
        graph(
            "Jobs by key",
            "Under way, the keys that have most. Keys have names here where /metrics asks for one.",
            "none",
            [Query("topk(8, max by (key, state) (dycoke_key_jobs))", "{{key}} {{state}}")],
        ),
    ],
)

_latency = Row(
    "Latency of answers that ended well",
    [
        graph("End to end", "Acceptance to the end of an answer.", "s", quantiles(LATENCY, M)),
        graph("Time to first token", "Since acceptance.", "s", quantiles(TTFT, M)),
        graph("Inter-token latency", "Between two tokens at the API.", "s", quantiles(ITL, M)),
    ],
)

_saturation = Row(
    "Queue and saturation",
    [
        graph(
            "Queue",
            "Jobs accepted and not with a worker, and their places; one key may have the capacity.",
            "none",
            [
                Query(f"max(dycoke_queue_depth{M})", "jobs"),
                Query(f"max(dycoke_queue_places{M})", "places that they take"),
                Query("max(dycoke_queue_capacity)", "capacity"),
            ],
        ),
        graph(
            "Age of the oldest queued job",
            "Since its acceptance.",
            "s",
            [Query(f"max by (model) (dycoke_queue_oldest_age_seconds{M})", "{{model}}")],
        ),
        graph(
            "Saturation",
            "Use of what is bounded. Beyond 100 % of the queue, keys with their share get 429; at "
            "200 %, all. At 100 % of answers, posts get 503.",
            "percentunit",
            [
                Query(f"max(dycoke_queue_places{M}) / max(dycoke_queue_capacity)", "queue"),
                Query(
                    "max(sum by (instance) (dycoke_open_streams)"
                    " / max by (instance) (dycoke_stream_capacity))",
                    "open answers",
                ),
                Query(
                    f"sum(dycoke_requests_running{M}) / sum(dycoke_requests_capacity{M})",
                    "workers' places",
                ),
                Query(f"max(dycoke_kv_cache_usage_ratio{M})", "KV cache, fullest worker"),
            ],
            top=2,
        ),
    ],
)

_edge = Row(
    "Clients, readers and the API's processes",
    [
        graph(
            "Streams",
            "Clients that came back with Last-Event-ID, and clients that left before the end.",
            "cps",
            [
                Query(rate("dycoke_stream_resumes_total", ""), "resumed"),
                Query(rate("dycoke_client_disconnects_total", ""), "deserted"),
            ],
        ),
        graph(
            "Frame readers",
            "Children killed, by reason: a few come with hostile or broken uploads. Those that "
            "ended in an exception are bugs, of ours or a library's.",
            "cps",
            [
                Query(rate("dycoke_reader_kills_total", "", "reason"), "{{reason}}"),
                Query(rate("dycoke_reader_exceptions_total", ""), "exception"),
            ],
        ),
        graph(
            "Event loop lag",
            "How late the API's event loop is: what every stream waits for.",
            "s",
            [
                Query(quantile(0.99, LAG, "", *PROCESS), f"p99 {EACH}"),
                Query(mean(LAG, "", *PROCESS), f"mean {EACH}"),
            ],
        ),
        graph(
            "Jobs whose frames are being read",
            "In each API process.",
            "none",
            [Query("sum by (instance, process) (dycoke_reader_jobs)", EACH)],
        ),
        graph(
            "API processes",
            "Those that answer, those that should, and deaths of late; each is started again.",
            "none",
            [
                Query("sum(dycoke_api_process_up)", "up"),
                Query("count(dycoke_api_process_up)", "of"),
                Query(f"sum(increase(dycoke_api_process_deaths_total[{RATE}]))", "deaths"),
            ],
        ),
        graph(
            "CPU of the API",
            "Cores in use by process. Frame readers are children of their own and not in it.",
            "none",
            [
                Query(rate("process_cpu_seconds_total", API, *PROCESS), EACH),
            ],
        ),
        graph(
            "Memory of the API",
            "Resident.",
            "bytes",
            [
                Query(f"sum by (instance, process) (process_resident_memory_bytes{API})", EACH),
            ],
        ),
    ],
)

BOARD = Board(
    uid="dycoke-service",
    title="DyCoke: Service",
    description="What clients experience, and what stands in the way of more.",
    variables=[Variable("model", "dycoke_workers_alive")],
    rows=[_now, _rate, _latency, _saturation, _edge],
)
