"""The report as pictures: accuracy over K, and what each policy costs each family."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot

from loadtest.accuracy.report import settings_in


def draw_charts(report: dict[str, Any], directory: Path) -> None:
    if "figure5" in report["tables"]:
        draw_figure5(report, directory / "figure5.png")
    if "table1" in report["tables"]:
        draw_families(report, directory / "families.png")


def draw_figure5(report: dict[str, Any], path: Path) -> None:
    """Accuracy over K, one line per number of frames, with intervals."""
    by_frames: dict[int, list[dict[str, Any]]] = {}
    for _, row in settings_in(report, "figure5"):
        by_frames.setdefault(row["num_frames"], []).append(row)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, measure in zip(axes, ("short", "describe"), strict=True):
        for num_frames, rows in by_frames.items():
            shares = [row["compression"].get("k", 0.0) for row in rows]
            values = np.array([row[measure]["value"] for row in rows])
            below = values - [row[measure]["low"] for row in rows]
            above = [row[measure]["high"] for row in rows] - values
            axis.errorbar(
                shares, values, (below, above), label=f"{num_frames} frames", marker="o", capsize=2
            )
        axis.set_xlabel("K (0: full tokens)")
        axis.set_title({"short": "short answers", "describe": "descriptions"}[measure])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy")
    axes[0].legend()
    _save(figure, path)


def draw_families(report: dict[str, Any], path: Path) -> None:
    """Each family's difference from full tokens under each policy of Table 1."""
    rows = settings_in(report, "table1")[1:]
    full = report["settings"]["full"]["families"]
    families = list(full)
    changes = np.array([[row["families"][f] - full[f] for f in families] for _, row in rows])
    figure, axis = pyplot.subplots(figsize=(10, 0.36 * len(rows) + 1.8), layout="constrained")
    largest = max(float(np.abs(changes).max()), 0.05)
    image = axis.imshow(changes, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    axis.set_xticks(range(len(families)), families, rotation=35, ha="right")
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    for (y, x), change in np.ndenumerate(changes):
        color = "white" if abs(change) > 0.6 * largest else "black"
        axis.text(x, y, f"{change:+.2f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, label="against full tokens")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
