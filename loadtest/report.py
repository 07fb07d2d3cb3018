"""A comparison's results as a Markdown table, plots, and JSON."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # after choosing a backend that needs no screen

from loadtest.runs import Result, Spread

COLORS = {"full": "tab:gray", "dycoke": "tab:blue"}
NOTHING = "-"


def write_report(
    folder: Path, results: Sequence[Result], *, objective_s: float, about: dict[str, Any]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    closed = [result for result in results if not result.plan.is_open]
    opened = [result for result in results if result.plan.is_open]
    _plot_closed(folder / "closed-loop.png", closed)
    _plot_open(folder / "open-loop.png", opened, objective_s)
    content = {
        **about,
        "ttft_objective_s": objective_s,
        "runs": [
            result.as_json()
            | {
                "good_share": result.good_share(objective_s),
                "goodput_per_s": result.goodput_per_s(objective_s),
            }
            for result in results
        ],
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "report.md").write_text(_markdown(closed, opened, objective_s, about))


def _markdown(
    closed: Sequence[Result], opened: Sequence[Result], objective_s: float, about: dict[str, Any]
) -> str:
    machine = about["machine"]
    plan = closed[0].plan
    return "\n".join(
        [
            "# Full tokens against DyCoke, through the whole service",
            "",
            f"Model: {about['model']}. {machine['cores']} cores of {machine['cpu']}, for service "
            f"and load generator; {plan.num_frames} frames; {plan.duration_s:.0f} s a run. "
            f"torch {about['packages']['torch']}, commit {about['commit']}, {about['date']}.",
            "",
            "Times are the client's, from sending the request (with its video, where it is new). "
            "The mix: `loadtest/scenarios.py`. Settings alternate. Stall: for how long the load "
            "generator itself got no CPU, at most.",
            "",
            "## Closed loop: as many clients, each with one thing at a time",
            "",
            *_table(closed, objective_s, lambda r: str(r.plan.users), "users"),
            "",
            "![](closed-loop.png)",
            "",
            "## Open loop: arrivals at random moments, whether or not earlier ones have ended",
            "",
            f"Goodput: answers whose first token came within {objective_s:.2f} s.",
            "",
            *_table(opened, objective_s, lambda r: f"{r.plan.rate:.2f}", "arrivals/s"),
            "",
            "![](open-loop.png)",
            "",
        ]
    )


def _table(
    results: Sequence[Result], objective_s: float, load: Callable[[Result], str], name: str
) -> list[str]:
    heads = (
        *(name, "setting", "answers/s", "tokens/s"),
        *("TTFT p50 / p95 s", "new video p50", "known video p50"),
        *("ITL p50 / p95 ms", "E2E p50 / p95 s", "goodput/s", "in time"),
        *("rejected", "failed", "stall s"),
    )
    rows = [
        (
            *(load(r), r.plan.compression, f"{r.answers_per_s:.2f}", f"{r.tokens_per_s:.1f}"),
            *(as_pair(r.ttft_s), _median(r.ttft_new_s), _median(r.ttft_known_s)),
            *(as_pair(r.itl_s, scale=1000, digits=1), as_pair(r.e2e_s)),
            *(f"{r.goodput_per_s(objective_s):.2f}", f"{r.good_share(objective_s):.0%}"),
            *(str(r.num_rejected), str(len(r.failures)), f"{r.max_stall_s:.2f}"),
        )
        for r in results
    ]
    return markdown_table(heads, rows)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def as_pair(spread: Spread | None, *, scale: float = 1, digits: int = 3) -> str:
    """Median and 95th percentile."""
    if spread is None:
        return NOTHING
    return f"{spread.p50 * scale:.{digits}f} / {spread.p95 * scale:.{digits}f}"


def _median(spread: Spread | None) -> str:
    return NOTHING if spread is None else f"{spread.p50:.3f}"


# --- plots ---


def _plot_closed(path: Path, results: Sequence[Result]) -> None:
    def load(result: Result) -> float:
        return result.plan.users

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4))
    _lines(left, results, load, lambda r: _of(r.ttft_s, "p50"), "p50")
    _lines(left, results, load, lambda r: _of(r.ttft_s, "p95"), "p95", "--")
    _label(left, "Time to first token", "users", "seconds")
    _lines(middle, results, load, lambda r: _of(r.itl_s, "p50", scale=1000), "p50")
    _label(middle, "Inter-token latency", "users", "milliseconds")
    _lines(right, results, load, lambda r: r.tokens_per_s, "")
    _label(right, "Throughput", "users", "tokens per second")
    save_figure(figure, path)


def _plot_open(path: Path, results: Sequence[Result], objective_s: float) -> None:
    def load(result: Result) -> float:
        return result.plan.rate

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    _lines(left, results, load, lambda r: r.good_share(objective_s) * 100, "")
    _label(left, f"First token within {objective_s:.2f} s", "arrivals per second", "% of questions")
    _lines(right, results, load, lambda r: _of(r.ttft_s, "p50"), "p50")
    _lines(right, results, load, lambda r: _of(r.ttft_s, "p95"), "p95", "--")
    right.axhline(objective_s, color="tab:red", linewidth=0.8, label="objective")
    _label(right, "Time to first token", "arrivals per second", "seconds")
    save_figure(figure, path)


def _of(spread: Spread | None, name: str, *, scale: float = 1) -> float | None:
    return None if spread is None else scale * float(getattr(spread, name))


def _lines(
    axes: Any,
    results: Sequence[Result],
    load: Callable[[Result], float],
    value: Callable[[Result], float | None],
    name: str,
    style: str = "-",
) -> None:
    for setting, color in COLORS.items():
        ours = [result for result in results if result.plan.compression == setting]
        axes.plot(
            [load(result) for result in ours],
            [value(result) for result in ours],
            style,
            marker="o",
            color=color,
            label=f"{setting} {name}".strip(),
        )


def _label(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def save_figure(figure: Any, path: Path) -> None:
    """Writes a plot and forgets it."""
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
