"""One run of locust against a service, and its figures.

Figures count what ended within the run's time. What was still running then is waited for, so that
failures show, but counts in no throughput.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LOCUSTFILE = Path(__file__).parent / "locustfile.py"
ROOT = LOCUSTFILE.parent.parent
STOP_TIMEOUT_S = 120
ASKS = ("ask_new", "ask_again")
ASK_NAMES = ("new video", "known video")


@dataclass(frozen=True, slots=True)
class Plan:
    """Args:
    users: closed loop: this many clients, each doing one thing at a time; 0: open loop.
    rate: open loop: arrivals per second.
    """

    compression: str
    users: int
    rate: float
    duration_s: float
    num_frames: int
    seed: int

    @property
    def is_open(self) -> bool:
        return self.users == 0

    @property
    def label(self) -> str:
        load = f"{self.rate:.2f}/s open loop" if self.is_open else f"{self.users} users"
        return f"{self.compression:>7}, {load}"


@dataclass(frozen=True, slots=True)
class Spread:
    count: int
    mean: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread | None":
        if not values:
            return None
        ordered = sorted(values)
        return cls(
            len(ordered), statistics.fmean(ordered), *(_quantile(ordered, q) for q in (50, 95, 99))
        )


@dataclass(frozen=True, slots=True)
class Result:
    plan: Plan
    failures: list[str]
    max_stall_s: float  # of the load generator: by how much its clocks may be wrong
    num_rejected: int
    arrivals: dict[str, int]
    answers_per_s: float  # streamed answers that ended well within the run's time
    tokens_per_s: float  # of these answers
    ttft_s: Spread | None
    ttft_new_s: Spread | None
    ttft_known_s: Spread | None
    itl_s: Spread | None
    e2e_s: Spread | None
    ttfts_s: list[float]  # all of them, for goodput
    samples: dict[str, list[tuple[float, float]]]
    locust: list[dict[str, Any]]

    def good_share(self, objective_s: float) -> float:
        """The share of questions that got their first token in time; a refused one did not."""
        asked = sum(self.arrivals.get(scenario, 0) for scenario in ASKS)
        return sum(ttft <= objective_s for ttft in self.ttfts_s) / asked if asked else 0.0

    def goodput_per_s(self, objective_s: float) -> float:
        return sum(ttft <= objective_s for ttft in self.ttfts_s) / self.plan.duration_s

    def as_json(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["samples"], fields["locust"]
        fields["ttfts_s"] = [round(seconds, 4) for seconds in self.ttfts_s]  # for other objectives
        return fields


def run_locust(
    plan: Plan, url: str, folder: Path, *, on_wait: Callable[[float], None] = lambda _: None
) -> Result:
    """Runs a plan against a service.

    Args:
        on_wait: called a few times per second with the seconds since the run started.

    Raises:
        RuntimeError: locust itself failed.
    """
    out = folder / "samples.json"
    out.unlink(missing_ok=True)
    with (folder / "locust.log").open("w") as log:
        process = subprocess.Popen(_argv(plan, url, out), cwd=ROOT, stdout=log, stderr=log)
    began_at = time.monotonic()
    while process.poll() is None:
        time.sleep(0.25)
        on_wait(time.monotonic() - began_at)
    if not out.exists():
        raise RuntimeError("locust failed:\n" + (folder / "locust.log").read_text()[-2000:])
    return summarise(plan, json.loads(out.read_text()))


def _argv(plan: Plan, url: str, out: Path) -> list[str]:
    options = {
        "--host": url,
        "--users": max(1, plan.users),
        "--spawn-rate": max(1, plan.users),
        "--run-time": f"{plan.duration_s:.0f}s",
        "--stop-timeout": STOP_TIMEOUT_S,
        "--compression": plan.compression,
        "--num-frames": plan.num_frames,
        "--rate": plan.rate,
        "--seed": plan.seed,
        "--out": out,
    }
    words = [str(word) for option in options.items() for word in option]
    user = "OpenLoop" if plan.is_open else "ClosedLoop"
    return [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"),
        *words,
        user,
    ]


def summarise(plan: Plan, raw: dict[str, Any]) -> Result:
    samples: dict[str, list[tuple[float, float]]] = raw["samples"]

    def in_time(kind: str, *names: str) -> list[float]:
        return [
            seconds
            for name in names
            for at_s, seconds in samples.get(f"{kind} {name}", [])
            if at_s <= plan.duration_s
        ]

    ended, gaps = in_time("E2E", *ASK_NAMES), in_time("ITL", *ASK_NAMES)
    ttfts = [s for name in ASK_NAMES for _, s in samples.get(f"TTFT {name}", [])]
    return Result(
        plan=plan,
        failures=raw["failures"],
        max_stall_s=raw["max_stall_s"],
        num_rejected=sum(len(v) for k, v in samples.items() if k.startswith("REJECTED")),
        arrivals=raw["arrivals"],
        answers_per_s=len(ended) / plan.duration_s,
        tokens_per_s=(len(gaps) + len(in_time("TTFT", *ASK_NAMES))) / plan.duration_s,
        ttft_s=Spread.of(ttfts),
        ttft_new_s=Spread.of([s for _, s in samples.get("TTFT new video", [])]),
        ttft_known_s=Spread.of([s for _, s in samples.get("TTFT known video", [])]),
        itl_s=Spread.of(gaps),
        e2e_s=Spread.of([s for name in ASK_NAMES for _, s in samples.get(f"E2E {name}", [])]),
        ttfts_s=ttfts,
        samples=samples,
        locust=raw["locust"],
    )


def _quantile(ordered: list[float], percent: int) -> float:
    """The smallest value that `percent` of all do not exceed."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]
