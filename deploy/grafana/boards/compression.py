"""What compression saves and costs: full tokens against each policy, side by side."""

from deploy.grafana.panels import Board, Query, Row, Variable, graph, mean, number, quantile, rate

M = '{model=~"$model"}'
TTFT = "dycoke_time_to_first_token_seconds"
ITL = "dycoke_inter_token_latency_seconds"
LATENCY = "dycoke_request_latency_seconds"
KV = "dycoke_request_kv_bytes"


def _of(policy: str) -> str:
    return f'{{model=~"$model", policy="{policy}"}}'


def _kind(kind: str) -> str:
    return f'{{model=~"$model", kind="{kind}"}}'


def _full_by_dycoke(metric: str) -> str:
    """The mean of full tokens as a multiple of DyCoke's."""
    return f"({mean(metric, _of('full'))}) / ({mean(metric, _of('dycoke'))})"


def _by_policy(metric: str, q: float) -> list[Query]:
    return [Query(quantile(q, metric, M, "policy"), "{{policy}}")]


def _tokens(stage: str) -> str:
    return f'{{model=~"$model", stage="{stage}"}}'


_met = '{model=~"$model", met="true"}'

NEEDS_BOTH = "needs answers of both"

_summary = Row(
    "Full tokens / DyCoke, of what was answered of late",
    [
        number(
            "First token",
            "Mean, times as long.",
            "none",
            _full_by_dycoke(TTFT),
            no_value=NEEDS_BOTH,
        ),
        number(
            "Between tokens",
            "Mean, times as long.",
            "none",
            _full_by_dycoke(ITL),
            no_value=NEEDS_BOTH,
        ),
        number(
            "End to end",
            "Mean, times as long.",
            "none",
            _full_by_dycoke(LATENCY),
            no_value=NEEDS_BOTH,
        ),
        number(
            "KV bytes per answer",
            "Mean, times as much.",
            "none",
            _full_by_dycoke(KV),
            no_value=NEEDS_BOTH,
        ),
        number(
            "FLOPs saved",
            "Share of what full tokens would have taken; all policies together.",
            "percentunit",
            f"1 - {rate('dycoke_flops_total', _kind('actual'))} / "
            f"{rate('dycoke_flops_total', _kind('full'))}",
        ),
        number(
            "FLOPs saved in the time shown",
            "Counted exactly, from the receipts; windows of Gemma 3 as if they were full.",
            "none",
            f"sum(increase(dycoke_flops_total{_kind('full')}[$__range])) - "
            f"sum(increase(dycoke_flops_total{_kind('actual')}[$__range]))",
        ),
    ],
)

_latency = Row(
    "Latency by policy",
    [
        graph("Time to first token, p50", "Since acceptance.", "s", _by_policy(TTFT, 0.5)),
        graph("Time to first token, p95", "Since acceptance.", "s", _by_policy(TTFT, 0.95)),
        graph("Inter-token latency, p50", "At the API.", "s", _by_policy(ITL, 0.5)),
        graph(
            "End to end, p50",
            "Answers of unlike length are not comparable.",
            "s",
            _by_policy(LATENCY, 0.5),
        ),
        graph(
            "End to end, p95",
            "Answers of unlike length are not comparable.",
            "s",
            _by_policy(LATENCY, 0.95),
        ),
        graph(
            "Answers by policy",
            "Jobs ended.",
            "reqps",
            [Query(rate("dycoke_requests_total", M, "policy"), "{{policy}}")],
        ),
    ],
)

_tokens_row = Row(
    "Visual tokens",
    [
        graph(
            "Retained ratio",
            "Visual tokens kept, as a share of all that the frames have: stage I in the prefill, "
            "stage II per pruned layer of a decode step.",
            "percentunit",
            [
                Query(
                    mean("dycoke_retained_token_ratio", M, "policy", "stage"),
                    "{{policy}}, {{stage}}",
                )
            ],
            top=1,
        ),
        graph(
            "Visual tokens by stage",
            "Out of the vision tower, into prefill, and in a pruned layer's decode step.",
            "none",
            [
                Query(
                    rate("dycoke_visual_tokens_total", _tokens(stage), "policy"),
                    f"{{{{policy}}}}, {stage}",
                )
                for stage in ("input", "prefill", "decode")
            ],
        ),
        graph(
            "Refreshes per generated token",
            "How often decode selects its visual tokens again: 1 would be at every step.",
            "none",
            [
                Query(
                    f"{rate('dycoke_kv_refreshes_total', M, 'policy')} / "
                    f"{rate('dycoke_generation_tokens_total', M, 'policy')}",
                    "{{policy}}",
                )
            ],
        ),
    ],
)

_cost = Row(
    "Memory and computation",
    [
        graph(
            "KV bytes per answer",
            "In use at its end, and what full tokens would hold; means.",
            "bytes",
            [
                Query(mean(KV, M, "policy"), "{{policy}}"),
                Query(mean(f"{KV}_full_tokens", M, "policy"), "{{policy}}, with full tokens"),
            ],
        ),
        graph(
            "FLOPs",
            "Per second: what answers took, and what full tokens would have.",
            "none",
            [Query(rate("dycoke_flops_total", M, "policy", "kind"), "{{policy}}, {{kind}}")],
        ),
        graph(
            "Peak memory while a job ran, p95",
            "Of the device; on a CPU of the worker's process.",
            "bytes",
            [Query(quantile(0.95, "dycoke_request_peak_memory_bytes", M, "policy"), "{{policy}}")],
        ),
    ],
)

_auto = Row(
    "Policy auto",
    [
        graph(
            "Levels chosen",
            "Of the ladder, 0 being the least compression, and why.",
            "reqps",
            [
                Query(
                    rate("dycoke_auto_choices_total", M, "level", "reason"), "{{level}}, {{reason}}"
                )
            ],
        ),
        graph(
            "Objective met",
            "Share of jobs, finished or at their deadline, whose first token came in time.",
            "percentunit",
            [
                Query(
                    f"{rate('dycoke_auto_objectives_total', _met)} / "
                    f"{rate('dycoke_auto_objectives_total', M)}",
                    "met",
                )
            ],
            top=1,
        ),
        graph(
            "Prediction error",
            "Time to first token, less what was predicted.",
            "s",
            [
                Query(quantile(q, "dycoke_auto_prediction_error_seconds", M), f"p{100 * q:.0f}")
                for q in (0.5, 0.95)
            ],
        ),
    ],
)

BOARD = Board(
    uid="dycoke-compression",
    title="DyCoke: Compression",
    description="Full tokens against compressed ones.",
    variables=[Variable("model", "dycoke_workers_alive")],
    rows=[_summary, _latency, _tokens_row, _cost, _auto],
)
