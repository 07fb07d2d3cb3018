"""Full tokens against DyCoke, through the whole service, under the same load.

    python -m loadtest.compare [--model medium] [--users 1 4 8] [--duration 30] [--out FOLDER]

Starts a service with the bundled model (or `medium`, random weights with 196 tokens per frame, or
any model), and runs the same mix of requests against both settings: closed loop at several numbers
of users, then open loop at shares of what full tokens managed in the closed loop. Runs of the two
settings alternate, so that a machine that slows down slows down both. Writes `report.md`,
`results.json` and plots into the folder.

    python -m loadtest.compare --auto ...

compares policy `auto` with both instead, under a load that steps up and down: see
`loadtest.auto.compare`, and `--auto --help`.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from loadtest.machine import describe
from loadtest.report import write_report
from loadtest.running import RunningService, model_settings, running_service
from loadtest.runs import Plan, Result, run_locust
from loadtest.stalls import repeat_stalled

AUTO_OPTION = "--auto"
SETTINGS = ("full", "dycoke")
OPEN_LOOP_SHARES = (0.3, 0.6, 0.9)
OBJECTIVE_FACTOR = 1.5  # times the p95 time to first token of full tokens and one user
CLEAR = "\r\033[K" if sys.stdout.isatty() else ""
RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if AUTO_OPTION in words:
        from loadtest.auto.compare import main as compare_auto

        return compare_auto([word for word in words if word != AUTO_OPTION])
    options = _parse(words)
    about = describe()  # before this loads the machine
    with tempfile.TemporaryDirectory(prefix="dycoke-loadtest-") as folder:
        settings = model_settings(options.model, Path(folder))
        settings |= dict(pair.split("=", 1) for pair in options.set)
        print("Starting the service ...", flush=True)
        with running_service(Path(folder), settings) as service:
            comparison = Comparison(options, service, Path(folder))
            results = comparison.run()
            objective_s = comparison.objective_s
    about |= {
        "model": options.model or "bundled",
        "settings": settings | ({"DYCOKE_MODEL": options.model} if options.model else {}),
        "argv": words,
    }
    write_report(options.out, results, objective_s=objective_s, about=about)
    print(f"\nReport: {options.out / 'report.md'}")
    failures = [failure for result in results for failure in result.failures]
    for failure in failures[:10]:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.compare", description=__doc__)
    parser.add_argument(
        AUTO_OPTION, action="store_true", help="policy auto, with options of its own"
    )
    parser.add_argument("--model", default="", help="`medium`, a directory, or a hub id")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--duration", type=float, default=30.0, help="seconds of each run")
    parser.add_argument("--num-frames", type=int, default=32)
    parser.add_argument(
        "--ttft-objective",
        type=float,
        help="seconds; default: 1.5 x the p95 of full tokens and the fewest users",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "service")
    parser.add_argument(
        "--set", action="append", default=[], metavar="DYCOKE_X=Y", help="a setting of the service"
    )
    return parser.parse_args(argv)


class Comparison:
    def __init__(self, options: argparse.Namespace, service: RunningService, folder: Path) -> None:
        self._options = options
        self._service = service
        self._folder = folder
        self._num_done = 0
        self._num_runs = len(SETTINGS) * (len(options.users) + len(OPEN_LOOP_SHARES))
        self.objective_s = 0.0

    def run(self) -> list[Result]:
        closed = [
            self.run_one(setting, users=users)
            for users in self._options.users
            for setting in SETTINGS
        ]
        full = [result for result in closed if result.plan.compression == "full"]
        first = full[0].ttft_s
        self.objective_s = self._options.ttft_objective or (
            OBJECTIVE_FACTOR * first.p95 if first else 1.0
        )
        capacity = max(_arrivals_per_s(result) for result in full)
        print(
            f"Full tokens managed {capacity:.2f} arrivals/s; objective for the first token: "
            f"{self.objective_s:.2f} s",
            flush=True,
        )
        return closed + [
            self.run_one(setting, rate=share * capacity)
            for share in OPEN_LOOP_SHARES
            for setting in SETTINGS
        ]

    def run_one(self, setting: str, *, users: int = 0, rate: float = 0.0) -> Result:
        plan = Plan(
            compression=setting,
            users=users,
            rate=rate,
            duration_s=self._options.duration,
            num_frames=self._options.num_frames,
            seed=self._options.seed,
        )
        self._num_done += 1
        head = f"[{self._num_done}/{self._num_runs}] {plan.label}"

        def run() -> Result:
            result = run_locust(
                plan, self._service.url, self._folder, on_wait=lambda s: _show(head, s)
            )
            print(f"{CLEAR}{head}: {_in_short(result)}", flush=True)
            return result

        return repeat_stalled(run)


def _arrivals_per_s(result: Result) -> float:
    return sum(result.arrivals.values()) / result.plan.duration_s


def _show(head: str, seconds: float) -> None:
    if sys.stdout.isatty():
        print(f"{CLEAR}{head} ... {seconds:.0f} s", end="", flush=True)


def _in_short(result: Result) -> str:
    ttft, itl = result.ttft_s, result.itl_s
    if ttft is None or itl is None:
        return f"no answers, {len(result.failures)} failures, {result.num_rejected} rejected"
    return (
        f"{result.answers_per_s:.2f} answers/s, TTFT p50 {ttft.p50:.3f} p95 {ttft.p95:.3f} s, "
        f"ITL p50 {itl.p50 * 1000:.1f} ms, {result.num_rejected} rejected, "
        f"{len(result.failures)} failures"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the service ends, too
    began_at = time.monotonic()
    exit_code = main()
    print(f"Took {time.monotonic() - began_at:.0f} s")
    sys.exit(exit_code)
