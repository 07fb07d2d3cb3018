"""What a run has found so far, written to disk after every figure, so that a killed run keeps it.

`report.json` has everything, `report.md` the summary and the figures for people. Both are replaced
atomically: a reader sees a complete older file or a complete newer one.
"""

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from loadtest.gpu.goals import BY_KEY, GOALS, Goal

Status = Literal["ok", "failed", "skipped", "running"]


@dataclass(slots=True)
class Figure:
    """A measured value: the median of its samples, with the least and the greatest."""

    value: float
    unit: str
    section: str
    low: float
    high: float
    num_samples: int
    note: str = ""
    is_met: bool | None = None  # decided by a count; None: by the goal's bound, if it has one


@dataclass(slots=True)
class SectionRun:
    status: Status
    budget_s: float
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    traceback: str | None = None


@dataclass(slots=True)
class Report:
    """
    Args:
        directory: exists.
        is_dry: toy sizes on a CPU: the figures mean nothing, and the report says so.
    """

    directory: Path
    is_dry: bool
    machine: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, SectionRun] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    current: str = ""  # the section that runs

    # --- what sections call ---

    def record(
        self,
        key: str,
        samples: float | Sequence[float],
        unit: str = "",
        *,
        note: str = "",
        is_met: bool | None = None,
    ) -> float:
        """Records one figure from its samples and returns their median."""
        values = [samples] if isinstance(samples, int | float) else list(samples)
        if not values or not all(math.isfinite(value) for value in values):
            raise ValueError(f"{key}: no finite samples: {values}")
        unit = unit or BY_KEY[key].unit
        figure = Figure(
            value=statistics.median(values),
            unit=unit,
            section=self.current,
            low=min(values),
            high=max(values),
            num_samples=len(values),
            note=note,
            is_met=is_met,
        )
        self.figures[key] = figure
        self.save()
        print(f"  {key:44} {_number(figure.value):>10} {unit}", flush=True)
        return figure.value

    def note(self, text: str) -> None:
        self.sections[self.current].notes.append(text)
        print(f"  note: {text}", flush=True)

    def detail(self, key: str, value: Any) -> None:
        """Records a value that is not a single figure, only in the JSON."""
        self.sections[self.current].details[key] = value
        self.save()

    # --- outcome ---

    def verdict(self, goal: Goal) -> bool | None:
        """Whether the goal is met; None: not measured, or in a dry run."""
        figure = self.figures.get(goal.key)
        if figure is None or self.is_dry:
            return None
        return goal.is_met(figure.value) if figure.is_met is None else figure.is_met

    def _share_of_ideal(self, goal: Goal) -> float | None:
        figure = self.figures.get(goal.key)
        return None if figure is None or self.is_dry else goal.share_of_ideal(figure.value)

    def summary(self) -> list[dict[str, Any]]:
        rows = []
        for goal in GOALS:
            figure = self.figures.get(goal.key)
            rows.append(
                {
                    **asdict(goal),
                    "measured": figure.value if figure else None,
                    "low": figure.low if figure else None,
                    "high": figure.high if figure else None,
                    "share_of_ideal": self._share_of_ideal(goal),
                    "met": self.verdict(goal),
                }
            )
        return rows

    def load(self) -> None:
        """Loads what other processes have written to the directory since."""
        path = self.directory / "report.json"
        if path.is_file():
            content = json.loads(path.read_text())
            self.machine = content["machine"]
            self.figures = {key: Figure(**value) for key, value in content["figures"].items()}
            self.sections = {k: SectionRun(**value) for k, value in content["sections"].items()}

    def save(self) -> None:
        content = {
            "dry_run": self.is_dry,
            "machine": self.machine,
            "summary": self.summary(),
            "figures": {key: asdict(figure) for key, figure in self.figures.items()},
            "sections": {name: asdict(run) for name, run in self.sections.items()},
        }
        _replace(self.directory / "report.json", json.dumps(content, indent=1) + "\n")
        _replace(self.directory / "report.md", self.markdown())

    def markdown(self) -> str:
        blocks = [_heading(self.is_dry), _summary_table(self.summary())]
        for name, run in self.sections.items():
            figures = {k: f for k, f in self.figures.items() if f.section == name}
            blocks.append(_section_text(name, run, figures))
        return "\n\n".join(block for block in blocks if block) + "\n"


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _heading(is_dry: bool) -> str:
    text = "# Figures of a GPU\n\nRandom weights: speed and memory, not answers. "
    text += "Medians; in brackets the least and the greatest sample."
    if is_dry:
        text += "\n\n**A dry run: toy sizes on a CPU. No figure below means anything.**"
    return text


def _summary_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| figure (7B unless named) | measured | goal | ideal | share of ideal | met |",
        "|---|---|---|---|---|---|",
    ]
    signs = {"at_most": "≤ ", "at_least": "≥ ", "exact": ""}
    for row in rows:
        goal = "exact" if row["goal"] is None else signs[row["sense"]] + _number(row["goal"])
        measured = "-"
        if row["measured"] is not None:
            measured = f"{_number(row['measured'])} {_spread(row['low'], row['high'])}".strip()
        share = "-" if row["share_of_ideal"] is None else f"{row['share_of_ideal']:.2f}"
        ideal = "-" if row["ideal"] is None else _number(row["ideal"])
        met = {True: "yes", False: "**no**", None: "-"}[row["met"]]
        title = f"{row['title']}, {row['unit']}"
        lines.append(f"| {title} | {measured} | {goal} | {ideal} | {share} | {met} |")
    return "\n".join(lines)


def _section_text(name: str, run: SectionRun, figures: dict[str, Figure]) -> str:
    lines = [f"## {name}: {run.status}, {run.seconds:.1f} s of {run.budget_s:.0f}"]
    lines += [f"- {note}" for note in run.notes]
    if figures:
        lines += ["", "| figure | value | unit | note |", "|---|---|---|---|"]
    for key, figure in figures.items():
        value = f"{_number(figure.value)} {_spread(figure.low, figure.high)}".strip()
        lines.append(f"| {key} | {value} | {figure.unit} | {figure.note} |")
    if run.traceback:
        lines += ["", "```", run.traceback.rstrip(), "```"]
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _spread(low: float, high: float) -> str:
    return "" if low == high else f"[{_number(low)}..{_number(high)}]"
