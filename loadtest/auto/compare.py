"""Policy `auto` against fixed settings at the same arrivals, through the whole service.

    python -m loadtest.compare --auto [--model medium] [--turns 2] [--phase 10] [--out FOLDER]

First measures what full tokens manage with the model on this machine. Then an open loop steps
through shares of that, half to two and a half times, with a burst: each setting gets the same
questions at the same moments, by turns, each time against a fresh service. Goodput counts answers
that are right and whose first token came within the objective. Writes `report.md`, `results.json`,
`answers.csv` and a plot into the folder.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dycoke_core.auto import AutoConfig, parse_compression
from dycoke_core.errors import InvalidRequestError
from loadtest.auto.bench import Bench, Turn, as_compression
from loadtest.auto.calibration import Calibration
from loadtest.auto.figures import AUTO, FULL, Comparison
from loadtest.auto.profile import PHASES
from loadtest.auto.report import as_difference, write_report
from loadtest.auto.videos import make_videos
from loadtest.machine import describe
from loadtest.running import model_settings

SETTINGS = (FULL, "dycoke", AUTO)
RESULTS = Path(__file__).parent.parent / "results"


def main(argv: Sequence[str]) -> int:
    """Args:
    argv: without `--auto`.
    """
    options = _parse(argv)
    about = describe()  # before this loads the machine
    about["argv"] = ["--auto", *argv]
    with tempfile.TemporaryDirectory(prefix="dycoke-loadtest-") as folder:
        settings = model_settings(options.model, Path(folder))
        settings |= dict(pair.split("=", 1) for pair in options.set)
        videos = make_videos(options.videos)
        bench = Bench(Path(folder), settings, videos, judges=not options.model)
        calibration = _calibration(options, bench)
        turns = bench.run(
            options.settings,
            num_turns=options.turns,
            phase_s=options.phase,
            capacity_per_s=calibration.capacity_per_s,
            objective_s=calibration.objective_s,
            seed=options.seed,
        )
    about |= {
        "model": options.model or "bundled",
        "settings": settings | ({"DYCOKE_MODEL": options.model} if options.model else {}),
        "calibration": asdict(calibration),
        "profile": {
            "phases": [asdict(phase) for phase in PHASES],
            "phase_s": options.phase,
            "num_turns": options.turns,
            "num_videos": options.videos,
            "seed": options.seed,
        },
        "max_stall_s": max(result.max_stall_s for turn in turns for result in turn.values()),
    }
    return _report(options, turns, calibration, about)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.compare --auto",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="", help="`medium`, a directory, or a hub id")
    parser.add_argument(
        "--settings", nargs="+", type=_setting, default=SETTINGS, metavar="COMPRESSION"
    )
    parser.add_argument("--turns", type=_count, default=2, help="of each setting: own arrivals")
    parser.add_argument("--phase", type=_positive, default=10.0, help="seconds of each phase")
    parser.add_argument("--videos", type=_count, default=48, help="different scenes")
    parser.add_argument("--objective", type=_positive, help="seconds; default: by the factor")
    parser.add_argument(
        "--objective-factor", type=_positive, default=3.0, help="times the idle TTFT"
    )
    parser.add_argument("--capacity", type=_positive, help="questions/s; default: measured")
    parser.add_argument(
        "--calibrate", type=_count, default=40, help="questions to measure the capacity with"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: loadtest/results/auto or auto-medium")
    parser.add_argument(
        "--set", action="append", default=[], metavar="DYCOKE_X=Y", help="a setting of the service"
    )
    return parser.parse_args(argv)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _setting(text: str) -> str:
    """A policy's name, or a compression as JSON."""
    try:
        parse_compression(as_compression(text), AutoConfig())
    except (InvalidRequestError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    return text


def _calibration(options: argparse.Namespace, bench: Bench) -> Calibration:
    """As measured, where the options do not say it."""
    if options.capacity and options.objective:
        return Calibration(options.capacity, None, options.objective)
    found = bench.calibrate(
        num_questions=options.calibrate, objective_factor=options.objective_factor
    )
    found = Calibration(
        options.capacity or found.capacity_per_s,
        found.idle_ttft_s,
        options.objective or found.objective_s,
    )
    print(
        f"Full tokens manage {found.capacity_per_s:.2f} questions/s, first token of a new video "
        f"with nothing else to do {found.idle_ttft_s:.2f} s; objective {found.objective_s:.2f} s",
        flush=True,
    )
    return found


def _report(
    options: argparse.Namespace,
    turns: Sequence[Turn],
    calibration: Calibration,
    about: dict[str, Any],
) -> int:
    outcomes = [{name: turn[name].outcomes for name in options.settings} for turn in turns]
    comparison = Comparison(
        outcomes, PHASES, phase_s=options.phase, objective_s=calibration.objective_s
    )
    out = options.out or RESULTS / ("auto-medium" if options.model == "medium" else "auto")
    write_report(out, comparison, about)
    for claim in comparison.claims():
        difference = as_difference(claim.difference)
        print(f"{claim.phase}, {claim.measure}: {claim.text}: {difference}, {claim.verdict}")
    print(f"\nReport: {out / 'report.md'}")
    failures = [
        f"{setting}: {outcome.failure}"
        for setting in comparison.settings
        for outcome in comparison.outcomes[setting]
        if outcome.failure
    ]
    for failure in failures[:10]:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0
