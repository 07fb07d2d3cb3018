"""What a scrape of `/metrics` costs the API under load: does it delay the event loop?

    python -m loadtest.scrape [--duration 20] [--users 4] [--json]

The same load runs without scrapes, at Prometheus' usual rate, and far above it. The service's own
samples of its event loop's lag show how long other work waited; the clients' gaps between tokens
show whether anybody noticed. Prints a table for people, and with --json one JSON object last.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from loadtest.client import Service
from loadtest.machine import describe
from loadtest.running import running_service
from loadtest.runs import Plan, run_locust

RATES_PER_S = (0.0, 1 / 15, 1.0, 10.0)
LAG = "dycoke_event_loop_lag_seconds"


@dataclass(frozen=True)
class Row:
    scrapes_per_s: float
    num_scrapes: int
    scrape_ms: float  # mean, as the scraper sees it
    page_bytes: int
    lag_mean_ms: float
    lag_p99_ms: float  # the upper bound of its bucket
    lag_over_25_ms: float  # share of samples
    itl_p50_ms: float
    itl_p99_ms: float
    stall_s: float  # of the machine


class Scraper:
    """Reads the page at a set pace, in its own thread."""

    def __init__(self, url: str, rate_per_s: float) -> None:
        self.seconds: list[float] = []
        self.page_bytes = 0
        self._service = Service(url)
        self._rate_per_s = rate_per_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Scraper":
        if self._rate_per_s:
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        if self._rate_per_s:
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(1 / self._rate_per_s):
            began_at = time.perf_counter()
            self.page_bytes = len(self._service.text("/metrics"))
            self.seconds.append(time.perf_counter() - began_at)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.scrape", description=__doc__)
    parser.add_argument("--duration", type=float, default=20.0)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    about = describe()  # before this loads the machine
    with tempfile.TemporaryDirectory(prefix="dycoke-scrape-") as name:
        folder = Path(name)
        with running_service(folder) as service:
            rows = [
                _measure(service.url, folder, rate, options.users, options.duration)
                for rate in RATES_PER_S
            ]
    print(f"{'scrapes/s':>10}{'each ms':>9}{'KB':>7}{'lag mean ms':>13}{'p99 ms':>8}", end="")
    print(f"{'> 25 ms':>9}{'ITL p50 ms':>12}{'p99 ms':>8}{'stall s':>9}")
    for row in rows:
        print(f"{row.scrapes_per_s:10.2f}{row.scrape_ms:9.1f}{row.page_bytes / 1e3:7.1f}", end="")
        print(f"{row.lag_mean_ms:13.2f}{row.lag_p99_ms:8.1f}{row.lag_over_25_ms:9.1%}", end="")
        print(f"{row.itl_p50_ms:12.1f}{row.itl_p99_ms:8.1f}{row.stall_s:9.2f}")
    if options.json:
        print(json.dumps(about | {"rows": [asdict(row) for row in rows]}))
    return 0


def _measure(url: str, folder: Path, rate_per_s: float, users: int, duration_s: float) -> Row:
    print(f"{rate_per_s:.2f} scrapes/s for {duration_s:.0f} s ...", file=sys.stderr, flush=True)
    plan = Plan("dycoke", users=users, rate=0, duration_s=duration_s, num_frames=32, seed=1)
    before = _lag(Service(url))
    with Scraper(url, rate_per_s) as scraper:
        result = run_locust(plan, url, folder)
    after = _lag(Service(url))
    counts = {bound: after[bound] - before[bound] for bound in after}
    samples = counts["+Inf"]
    p99_s = min(
        (float(bound) for bound in counts if _is_bound(bound) and counts[bound] >= 0.99 * samples),
        default=float("inf"),
    )
    assert result.itl_s is not None
    return Row(
        scrapes_per_s=rate_per_s,
        num_scrapes=len(scraper.seconds),
        scrape_ms=1000 * statistics.fmean(scraper.seconds or [0.0]),
        page_bytes=scraper.page_bytes,
        lag_mean_ms=1000 * counts["sum"] / samples,
        lag_p99_ms=1000 * p99_s,
        lag_over_25_ms=1 - counts["0.025"] / samples,
        itl_p50_ms=1000 * result.itl_s.p50,
        itl_p99_ms=1000 * result.itl_s.p99,
        stall_s=result.max_stall_s,
    )


def _is_bound(name: str) -> bool:
    return name not in ("sum", "+Inf")


def _lag(service: Service) -> dict[str, float]:
    """The lag's cumulative buckets by their upper bound, and its sum, over all API processes."""
    page = service.text("/metrics")
    counts: defaultdict[str, float] = defaultdict(float)
    for bound, count in re.findall(
        rf'^{LAG}_bucket{{.*le="([^"]+)".*}} (\S+)$', page, re.MULTILINE
    ):
        counts[bound] += float(count)
    for total in re.findall(rf"^{LAG}_sum{{.*}} (\S+)$", page, re.MULTILINE):
        counts["sum"] += float(total)
    return dict(counts)


if __name__ == "__main__":
    sys.exit(main())
