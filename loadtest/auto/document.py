"""Copies the tables of `loadtest.compare --auto` from its results into `docs/benchmarks.md`.

    python -m loadtest.auto.document

A test fails if the document is not up to date.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from loadtest.accuracy.statistics import Estimate
from loadtest.auto.figures import AUTO, GOODPUT
from loadtest.auto.report import as_difference, as_levels, wrapped
from loadtest.report import NOTHING, markdown_table

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "loadtest" / "results"
FOLDERS = ("auto", "auto-medium")
BEGIN = "<!-- begin: loadtest.auto.document -->\n"
END = "<!-- end: loadtest.auto.document -->\n"

Figures = dict[str, Any]


def main() -> int:
    DOCUMENT.write_text(updated(DOCUMENT.read_text(), RESULTS))
    return 0


def updated(text: str, results: Path) -> str:
    """The document with what the results' folders say, those that there are."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    paths = [results / folder / "results.json" for folder in FOLDERS]
    parts = ["\n".join(_part(path)) for path in paths if path.exists()]
    return (
        before + BEGIN + "".join(f"\n{part}\n" for part in parts) + "\n" * bool(parts) + END + after
    )


def _part(path: Path) -> Iterator[str]:
    content = json.loads(path.read_text())
    machine, profile = content["machine"], content["profile"]
    sentence = (
        f"Model: {content['model']}; {machine['cores']} cores of {machine['cpu']}. Full tokens "
        f"manage {content['calibration']['capacity_per_s']:.2f} questions per second, and the "
        f"objective is {content['objective_s']:.2f} s. Turns: {profile['num_turns']}, of "
        f"{len(profile['phases'])} phases of {profile['phase_s']:g} s "
        f"(`loadtest/results/{path.parent.name}/report.md`)."
    )
    yield wrapped(sentence)
    yield ""
    yield from _table(content)


def _table(content: dict[str, Any]) -> list[str]:
    """One row for each phase, the settings side by side."""
    by_phase: dict[str, dict[str, Figures]] = {}
    for figures in content["figures"]:
        by_phase.setdefault(figures["phase"], {})[figures["setting"]] = figures
    loads = {phase["name"]: f"{phase['share']:g}" for phase in content["profile"]["phases"]}
    both = " / ".join(next(iter(by_phase.values())))
    heads = (
        *("phase", "load", f"goodput, {both}", "right answers", "TTFT p50 s", "p95 s"),
        *("goodput: auto less the best fixed", "auto answered with"),
    )
    columns = (_goodput, _accuracy, _ttft("p50"), _ttft("p95"))
    rows = [
        (
            *(phase, loads.get(phase, "")),
            *(" / ".join(map(write, found.values())) for write in columns),
            _difference(content["claims"], phase),
            _levels(found.get(AUTO)),
        )
        for phase, found in by_phase.items()
    ]
    return markdown_table(heads, rows)


def _goodput(figures: Figures) -> str:
    return f"{figures['good']['value']:.0%}"


def _accuracy(figures: Figures) -> str:
    return NOTHING if figures["accuracy"] is None else f"{figures['accuracy']:.3f}"


def _ttft(percentile: str) -> Callable[[Figures], str]:
    def write(figures: Figures) -> str:
        return NOTHING if figures["ttft_s"] is None else f"{figures['ttft_s'][percentile]:.2f}"

    return write


def _difference(claims: Sequence[dict[str, Any]], phase: str) -> str:
    """The smallest of a phase's differences in goodput: the one to the best fixed setting."""
    found = [c["difference"] for c in claims if (c["phase"], c["measure"]) == (phase, GOODPUT)]
    if not found:
        return NOTHING
    worst = min(found, key=lambda difference: float(difference["value"]))
    return as_difference(Estimate(**worst))


def _levels(figures: Figures | None) -> str:
    return NOTHING if figures is None else as_levels(figures["levels"])


if __name__ == "__main__":
    sys.exit(main())
