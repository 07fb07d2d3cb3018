"""Locust users of the service.

    locust -f loadtest/locustfile.py --headless --host http://127.0.0.1:8000 \\
        --users 4 --run-time 30s --compression dycoke ClosedLoop

`ClosedLoop`: each user does one thing after the other. `OpenLoop`: things start at random moments
(Poisson, `--rate` per second) whether or not earlier ones have ended, as with real crowds. Time to
first token, inter-token latency and end to end are locust metrics of kinds TTFT, ITL and E2E. A
refusal for lack of room (429, 503) has the kind REJECTED and does not count as a failure.
"""

import http.client
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Pool
from locust import User, constant, events, task
from locust.env import Environment
from locust.exception import StopUser

from loadtest.client import Service, ServiceError
from loadtest.scenarios import Broken, Draw, Scenarios
from loadtest.stalls import StallWatch

MAX_ARRIVALS_OPEN = 1000
DRAIN_S = 120.0  # for what is still running when the time is up
OVERLOAD = (429, 503)


@events.init_command_line_parser.add_listener
def _add_options(parser: Any) -> None:
    parser.add_argument("--compression", default="dycoke", help="a policy's name, or JSON")
    parser.add_argument(
        "--api-key", default="", env_var="LOADTEST_API_KEY", is_secret=True, help="if it wants one"
    )
    parser.add_argument("--num-frames", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.0, help="open loop: arrivals per second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="", help="file for every measurement, as JSON")


class Samples:
    """Every measurement of a run, exact; locust's own figures are rounded."""

    def __init__(self) -> None:
        self.by_name: dict[str, list[tuple[float, float]]] = {}  # (at, seconds), both since start
        self.failures: list[str] = []
        self.arrivals: Counter[str] = Counter()  # by scenario
        self.began_at_s = time.perf_counter()
        self.stalls = StallWatch()

    def add(self, kind: str, name: str, seconds: float) -> None:
        at_s = time.perf_counter() - self.began_at_s
        self.by_name.setdefault(f"{kind} {name}", []).append((at_s, seconds))

    def write(self, path: Path, stats: Any) -> None:
        content = {
            "duration_s": time.perf_counter() - self.began_at_s,
            "max_stall_s": self.stalls.max_stall_s,
            "arrivals": self.arrivals,
            "failures": self.failures,
            "samples": self.by_name,
            "locust": [entry.to_dict() for entry in stats.entries.values()],
        }
        path.write_text(json.dumps(content))


class Shared:
    """What all users of one run share."""

    samples: Samples
    scenarios: Scenarios


@events.init.add_listener
def _prepare(environment: Environment, **_: Any) -> None:
    """Runs before the clock starts."""
    options = environment.parsed_options
    assert options is not None and options.host
    text = options.compression

    def report(kind: str, name: str, seconds: float) -> None:
        Shared.samples.add(kind, name, seconds)
        _fire(environment, kind, name, seconds)

    Shared.scenarios = Scenarios(
        Service(options.host, api_key=options.api_key),
        report,
        compression=json.loads(text) if text.startswith("{") else text,
        num_frames=options.num_frames,
    )
    Shared.scenarios.warm_up()


@events.test_start.add_listener
def _start(**_: Any) -> None:
    Shared.samples = Samples()
    gevent.spawn(Shared.samples.stalls.watch)


@events.quitting.add_listener
def _write(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    if options is not None and options.out:
        Shared.samples.write(Path(options.out), environment.stats)


def _fire(
    environment: Environment, kind: str, name: str, seconds: float, error: Exception | None = None
) -> None:
    environment.events.request.fire(
        request_type=kind,
        name=name,
        response_time=seconds * 1000,
        response_length=0,
        exception=error,
        context={},
    )


def _do(environment: Environment, draw: Draw) -> float:
    """Runs one scenario; returns how long to wait before the next."""
    Shared.samples.arrivals[draw.scenario] += 1
    began_at_s = time.perf_counter()
    try:
        Shared.scenarios.run(draw)
    except ServiceError as error:
        seconds = time.perf_counter() - began_at_s
        if error.status in OVERLOAD:
            Shared.samples.add("REJECTED", error.code, seconds)
            _fire(environment, "REJECTED", error.code, seconds)
            return error.retry_after_s or 1.0
        _fail(environment, draw, seconds, error)
    except (Broken, OSError, http.client.HTTPException) as error:
        _fail(environment, draw, time.perf_counter() - began_at_s, error)
    return 0.0


def _fail(environment: Environment, draw: Draw, seconds: float, error: Exception) -> None:
    Shared.samples.failures.append(f"{draw.scenario}: {error!r}")
    _fire(environment, "FAILED", draw.scenario, seconds, error)


class ClosedLoop(User):
    wait_time = constant(0)
    _num_users = 0

    def on_start(self) -> None:
        options = self.environment.parsed_options
        assert options is not None
        ClosedLoop._num_users += 1
        self._chance = random.Random(f"{options.seed}-{ClosedLoop._num_users}")

    @task
    def act(self) -> None:
        gevent.sleep(_do(self.environment, Draw.of(self._chance)))


class OpenLoop(User):
    fixed_count = 1
    wait_time = constant(0)

    def on_start(self) -> None:
        options = self.environment.parsed_options
        assert options is not None
        self._rate = options.rate
        self._chance = random.Random(f"{options.seed}")
        self._under_way = Pool(MAX_ARRIVALS_OPEN)
        self._next_at_s = time.perf_counter()
        self._ends_at_s = self._next_at_s + (options.run_time or float("inf"))

    @task
    def arrive(self) -> None:
        """Draws arrival times ahead, so that a late one does not delay those after it."""
        self._next_at_s += self._chance.expovariate(self._rate)
        draw = Draw.of(self._chance)
        gevent.sleep(max(0.0, min(self._next_at_s, self._ends_at_s) - time.perf_counter()))
        if self._next_at_s >= self._ends_at_s:
            raise StopUser
        self._under_way.spawn(_do, self.environment, draw)

    def on_stop(self) -> None:
        self._under_way.join(timeout=DRAIN_S)
