"""A comparison's results: `report.md`, `results.json`, `answers.csv` and a plot over time."""

import csv
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadtest.accuracy.statistics import Estimate
from loadtest.auto.figures import AUTO, ByReason, Claim, Comparison, Figures
from loadtest.auto.plot import draw_timeline
from loadtest.auto.profile import NEW_SHARE, Phase
from loadtest.auto.run import Outcome
from loadtest.report import NOTHING, as_pair, markdown_table

PLOT = "timeline.png"
WIDTH = 100  # of prose
COLUMNS = (
    *("setting", "at_s", "phase", "video", "scene", "family", "ttft_s", "total_s", "right"),
    *("compression", "reason", "predicted_ttft_s", "prefix", "refused", "failure"),
)


def write_report(folder: Path, comparison: Comparison, about: dict[str, Any]) -> None:
    """Writes the four files.

    Args:
        about: where the figures come from; `calibration` and `profile` among it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw_timeline(folder / PLOT, comparison)
    content = {
        **about,
        "objective_s": comparison.objective_s,
        "figures": [asdict(figures) for figures in comparison.figures()],
        "auto_by_reason": [asdict(reason) for reason in comparison.by_reason()],
        "claims": [asdict(claim) for claim in comparison.claims()],
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    _write_answers(folder / "answers.csv", comparison)
    (folder / "report.md").write_text("\n".join(_markdown(comparison, about)))


def _markdown(comparison: Comparison, about: dict[str, Any]) -> Iterator[str]:
    figures = comparison.figures()
    is_judged = any(each.accuracy is not None for each in figures)
    yield "# Policy auto against fixed settings, at the same arrivals\n"
    yield wrapped(_measured_with(comparison, about))
    yield ""
    yield wrapped(
        f"Goodput: {'right answers' if is_judged else 'answers'} whose first token came within "
        f"{comparison.objective_s:.2f} s, as a share of all questions and per second. Square "
        "brackets: 95 % interval, from resampling quarters of phases. Times are the client's, from "
        "when the question was due; refused ones have none. Load: arrivals, as a multiple of what "
        "full tokens manage."
    )
    yield ""
    yield from figures_table(figures, comparison.phases)
    yield f"\n![]({PLOT})\n"
    if claims := comparison.claims():
        yield "## What was to be shown\n"
        yield wrapped(
            "Low load: the phases whose arrivals are half of what full tokens manage, without the "
            "burst. The interval of accuracy is exact, on answers that both settings gave."
        )
        yield ""
        yield from claims_table(claims)
    if reasons := comparison.by_reason():
        yield "\n## Why auto chose what it chose\n"
        yield "By the service's clock, from acceptance.\n"
        yield from _reasons_table(reasons)
    yield ""


def _measured_with(comparison: Comparison, about: dict[str, Any]) -> str:
    machine, calibration = about["machine"], about["calibration"]
    idle = ""
    if (idle_ttft_s := calibration["idle_ttft_s"]) is not None:
        idle = f", and with nothing else to do start to answer after {idle_ttft_s:.2f} s"
    return (
        f"Model: {about['model']}. {machine['cores']} cores of {machine['cpu']}, for service and "
        f"load generator, load before: {machine['load_before']:.1f}. torch "
        f"{about['packages']['torch']}, commit {about['commit']}, {about['date']}. Full tokens "
        f"manage {calibration['capacity_per_s']:.2f} questions per second{idle}. Turns: "
        f"{comparison.num_turns}, each setting against a fresh service; phases of "
        f"{comparison.phase_s:g} s. {NEW_SHARE:.0%} of the questions are about a new video, the "
        "others about one of the latest. The load generator's longest stall: "
        f"{about['max_stall_s']:.2f} s."
    )


def wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False)


def figures_table(figures: Sequence[Figures], phases: Sequence[Phase]) -> list[str]:
    """Markdown, one row for each phase and setting."""
    loads = {phase.name: f"{phase.share:g}" for phase in phases}
    heads = (
        *("phase", "load", "setting", "asked", "goodput", "goodput/s", "right"),
        *("TTFT p50 / p95 s", "refused", "failed", "answered with"),
    )
    rows = [
        (
            *(each.phase, loads.get(each.phase, ""), each.setting, str(each.num_asked)),
            *(_share(each.good), f"{each.goodput_per_s:.2f}"),
            NOTHING if each.accuracy is None else f"{each.accuracy:.3f}",
            *(as_pair(each.ttft_s), str(each.num_refused), str(each.num_failed)),
            as_levels(each.levels) if each.setting == AUTO else "",
        )
        for each in figures
    ]
    return markdown_table(heads, rows)


def claims_table(claims: Sequence[Claim]) -> list[str]:
    """Markdown, one row for each claim."""
    heads = ("measure", "claim", "phase", "difference", "verdict")
    rows = [
        (each.measure, each.text, each.phase, as_difference(each.difference), each.verdict)
        for each in claims
    ]
    return markdown_table(heads, rows)


def _reasons_table(reasons: Sequence[ByReason]) -> list[str]:
    heads = ("reason", "choices", "in time", "TTFT less predicted, p50 / p95 s")
    rows = [
        (each.reason, str(each.num_choices), f"{each.in_time:.0%}", as_pair(each.error_s))
        for each in reasons
    ]
    return markdown_table(heads, rows)


def _share(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} [{estimate.low:.0%}, {estimate.high:.0%}]"


def as_difference(estimate: Estimate) -> str:
    """A difference of shares with its interval."""
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def as_levels(levels: Mapping[str, float]) -> str:
    """Shares of the answers by compression."""
    return ", ".join(f"{name} {share:.0%}" for name, share in levels.items()) or NOTHING


def _write_answers(path: Path, comparison: Comparison) -> None:
    """Every arrival under every setting, for other questions than ours."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for setting, outcomes in comparison.outcomes.items():
            writer.writerows(_columns(setting, outcome, comparison) for outcome in outcomes)


def _columns(setting: str, outcome: Outcome, comparison: Comparison) -> list[Any]:
    arrival, choice = outcome.arrival, outcome.choice
    return [
        *(setting, _rounded(arrival.at_s), comparison.phases[arrival.phase].name),
        *(arrival.video, arrival.scene, arrival.question.family),
        *(_rounded(outcome.ttft_s), _rounded(outcome.total_s)),
        "" if outcome.is_right is None else int(outcome.is_right),
        outcome.compression or "",
        *((choice.reason, _rounded(choice.predicted_ttft_s)) if choice else ("", "")),
        "hit" if outcome.has_prefix else "",
        *(outcome.refused or "", outcome.failure or ""),
    ]


def _rounded(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3f}"
