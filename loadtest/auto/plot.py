"""A comparison over time, one panel each: arrivals, goodput, time to first token, auto's levels."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # after choosing a backend that needs no screen

from loadtest.auto.figures import AUTO, Comparison
from loadtest.auto.run import Outcome
from loadtest.report import COLORS, save_figure
from loadtest.runs import Spread

BINS_PER_PHASE = 4
AUTO_COLOR = "tab:green"
_LEVELS = "Greens"  # colour map, from the first level of the ladder to the last

Bins = list[list[Outcome]]


def draw_timeline(path: Path, comparison: Comparison) -> None:
    has_auto = AUTO in comparison.settings
    figure, panels = pyplot.subplots(
        3 + has_auto, 1, figsize=(12, 2.7 * (3 + has_auto)), sharex=True
    )
    bins = {setting: _bins(comparison, setting) for setting in comparison.settings}
    seconds = _bin_s(comparison) * comparison.num_turns

    def goodput(found: Sequence[Outcome]) -> float:
        return sum(map(comparison.is_good, found)) / seconds

    arrivals, good, ttft = panels[:3]
    times, found = _times(comparison), next(iter(bins.values()))
    arrivals.plot(times, [len(each) / seconds for each in found], color="black")
    _label(arrivals, "arrivals per second")
    _lines(good, times, bins, goodput)
    _label(good, "goodput per second")
    for panel in (arrivals, good):
        panel.set_ylim(bottom=0)
    _lines(ttft, times, bins, _median_ttft)
    ttft.set_yscale("log")
    ttft.axhline(comparison.objective_s, color="tab:red", linewidth=0.8, label="objective")
    _label(ttft, "time to first token, median s")
    if has_auto:
        _draw_levels(panels[3], times, bins[AUTO])
    panels[-1].set_xlabel("seconds")
    _mark_phases(panels, comparison)
    save_figure(figure, path)


def _lines(
    panel: Any,
    times: Sequence[float],
    bins: dict[str, Bins],
    value: Callable[[Sequence[Outcome]], float | None],
) -> None:
    for setting, found in bins.items():
        color = {**COLORS, AUTO: AUTO_COLOR}.get(setting)
        panel.plot(times, [value(each) for each in found], ".-", color=color, label=setting)


def _label(panel: Any, title: str) -> None:
    panel.set_ylabel(title)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_levels(panel: Any, times: Sequence[float], bins: Bins) -> None:
    """Shares of the answers by compression, stacked from the least to the strongest."""
    names = _names_in_order([outcome for found in bins for outcome in found])
    shares = [[_share(found, name) for found in bins] for name in names]
    depths = [0.15 + 0.85 * place / max(1, len(names) - 1) for place in range(len(names))]
    colors = pyplot.get_cmap(_LEVELS)(depths)
    if names:
        panel.stackplot(times, shares, labels=names, colors=colors, step="mid")
    panel.set_ylim(0, 1)
    _label(panel, "auto's choices, share")


def _names_in_order(outcomes: Sequence[Outcome]) -> list[str]:
    levels = {
        outcome.compression: outcome.choice.level
        for outcome in outcomes
        if outcome.compression is not None and outcome.choice is not None
    }
    return sorted(levels, key=lambda name: levels[name])


def _share(outcomes: Sequence[Outcome], name: str) -> float:
    num_answered = sum(outcome.is_answered for outcome in outcomes)
    ours = sum(outcome.compression == name for outcome in outcomes)
    return ours / num_answered if num_answered else 0.0


def _median_ttft(outcomes: Sequence[Outcome]) -> float | None:
    spread = Spread.of([o.ttft_s for o in outcomes if o.ttft_s is not None])
    return spread.p50 if spread else None


def _bin_s(comparison: Comparison) -> float:
    return comparison.phase_s / BINS_PER_PHASE


def _times(comparison: Comparison) -> list[float]:
    """The middle of every bin."""
    number = BINS_PER_PHASE * len(comparison.phases)
    return [(place + 0.5) * _bin_s(comparison) for place in range(number)]


def _bins(comparison: Comparison, setting: str) -> Bins:
    """Outcomes of all turns by when their questions were due."""
    bins: Bins = [[] for _ in range(BINS_PER_PHASE * len(comparison.phases))]
    for outcome in comparison.outcomes[setting]:
        bins[int(outcome.arrival.at_s / _bin_s(comparison))].append(outcome)
    return bins


def _mark_phases(panels: Sequence[Any], comparison: Comparison) -> None:
    for place, phase in enumerate(comparison.phases):
        starts_at_s = place * comparison.phase_s
        for panel in panels:
            panel.axvline(starts_at_s, color="gray", linewidth=0.5)
        middle_s = starts_at_s + comparison.phase_s / 2
        top = panels[0].get_xaxis_transform()
        panels[0].text(middle_s, 1.02, phase.name, ha="center", transform=top)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.set_xlim(0, comparison.phase_s * len(comparison.phases))
