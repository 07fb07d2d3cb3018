"""Draws a run's log: losses, and accuracies of training and of held-out scenes, by step.

matplotlib is imported only here, and only when a picture is drawn.
"""

from pathlib import Path
from typing import Any

from dycoke_core.tiny.questions import FAMILIES

Log = list[dict[str, Any]]
_VISION_HEADS = ("color", "shape", "background")


def draw_curves(log: Log, directory: Path) -> None:
    """Writes `vision.png` and `language.png`, each if the log has entries of its stage."""
    for stage, names in (("vision", _VISION_HEADS), ("language", FAMILIES)):
        entries = [entry for entry in log if entry["stage"] == stage]
        if entries:
            _draw(stage, entries, names, directory / f"{stage}.png")


def _draw(stage: str, entries: Log, names: tuple[str, ...], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    figure.suptitle(f"Stage: {stage}")
    left, middle, right = figure.subplots(1, 3)
    left.set(title="Loss (training)", xlabel="step", yscale="log")
    left.plot(*_series(entries, "train", "loss"))
    for axes, part, title in (
        (middle, "train", "Right answers (training)"),
        (right, "test", "Right answers (held-out scenes)"),
    ):
        axes.set(title=title, xlabel="step", ylim=(0, 1.02))
        for number, name in enumerate(names):
            style = "-" if number < 10 else "--"
            axes.plot(*_series(entries, part, name), style, label=name, linewidth=1.2)
    right.legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=110)


def _series(entries: Log, part: str, name: str) -> tuple[list[int], list[float]]:
    points = [(e["step"], e[part][name]) for e in entries if name in e.get(part, {})]
    return [step for step, _ in points], [value for _, value in points]
