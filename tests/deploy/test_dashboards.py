"""The dashboards, and the load generator's figures, against a real Prometheus that scrapes a real
service under load.
"""

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from deploy.grafana.generate import FOLDER, dashboards
from dycoke_core.tiny import CLIP
from loadtest.running import running_service
from loadtest.runs import Plan, Result, run_locust
from tests.deploy.prometheus import Prometheus, running_prometheus, tool

pytestmark = pytest.mark.timeout(300)

SETTINGS = ("full", "dycoke")
RUN_S = 8.0
SCRAPE_INTERVAL = "1s"
NUM_WARM_UP_JOBS = 4
# What Grafana would put in place of its variables.
VARIABLES = {
    "$__rate_interval": "2m",
    "$__range": "2m",
    "$model": ".*",
    "$instance": ".*",
}


@dataclass(frozen=True)
class Target:
    """One query of one panel."""

    dashboard: str
    panel: str
    ref_id: str
    expr: str


def targets() -> list[Target]:
    return [
        Target(name, panel["title"], target["refId"], target["expr"])
        for name, text in dashboards().items()
        for panel in json.loads(text)["panels"]
        for target in panel.get("targets", [])
    ]


TARGETS = targets()


@dataclass(frozen=True)
class Loaded:
    """A service that has been under load, and the figures of all who measured it."""

    prometheus: Prometheus
    results: list[Result]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    tool("prometheus")  # before anything is started
    folder = tmp_path_factory.mktemp("load")
    settings = {
        "DYCOKE_WORKER_THREADS": "1",
        "DYCOKE_DTYPE": "float32",
        "DYCOKE_AUTO_LADDER": '["vidcom2"]',  # none of SETTINGS, whose jobs are counted
    }
    with running_service(folder, settings) as service:
        scraped = {
            "dycoke-api": [service.url.removeprefix("http://")],
            "dycoke-worker": [f"127.0.0.1:{port}" for port in service.worker_ports()],
        }
        with running_prometheus(folder, scraped, scrape_interval=SCRAPE_INTERVAL) as prometheus:
            ask_with_auto(service.url)
            results = [
                run_locust(
                    Plan(setting, users=3, rate=0, duration_s=RUN_S, num_frames=8, seed=seed),
                    service.url,
                    folder,
                )
                for seed, setting in enumerate(SETTINGS)
            ]
            ask_with_auto(service.url)
            time.sleep(2.5)  # two more scrapes: all has been counted and recorded
            yield Loaded(prometheus, results)


def ask_with_auto(url: str) -> None:
    form = {"question": "What happens?", "compression": "auto", "max_tokens": "4"}
    files = {"video": CLIP.read_bytes()}
    response = httpx.post(f"{url}/v1/video/chat", data=form, files=files, timeout=60)
    assert '"reason":"' in response.raise_for_status().text


def test_dashboards_are_up_to_date() -> None:
    committed = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
    assert committed == dashboards(), "run `make dashboards`"


def test_panels_have_ids_titles_and_explanations() -> None:
    for text in dashboards().values():
        panels = json.loads(text)["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        for panel in panels:
            assert panel["title"] and (panel["type"] == "row" or panel["description"])


def test_every_exported_metric_is_on_a_dashboard_or_in_a_rule(loaded: Loaded) -> None:
    names = {
        re.sub(r"_(bucket|sum|count|created|total)$", "", sample["metric"]["__name__"])
        for sample in loaded.prometheus.query('{__name__=~"dycoke_.+"}')
    }
    rules = (FOLDER.parent.parent / "prometheus" / "rules").glob("*.yml")
    shown = " ".join([t.expr for t in TARGETS] + [path.read_text() for path in rules])
    assert {name for name in names if name not in shown} == set()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.dashboard}-{t.panel}-{t.ref_id}")
def test_every_query_of_every_panel_returns_data(loaded: Loaded, target: Target) -> None:
    expr = target.expr
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, "a variable that this test does not know"
    values = [float(sample["value"][1]) for sample in loaded.prometheus.query(expr)]
    assert values and not all(math.isnan(value) for value in values), expr


@pytest.mark.slow
def test_locust_saw_no_failure(loaded: Loaded) -> None:
    for result in loaded.results:
        assert result.failures == []
        assert {"ask_new", "ask_again"} <= set(result.arrivals)
        assert sum(entry["num_failures"] for entry in result.locust) == 0


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_prometheus_counts_the_jobs_that_locust_counts(loaded: Loaded, setting: str) -> None:
    """Every scenario but uploads is one job, and the warm-up's four are in one account only."""
    result = next(r for r in loaded.results if r.plan.compression == setting)
    jobs = sum(count for name, count in result.arrivals.items() if name != "upload")
    rejected = result.num_rejected
    counted = loaded.prometheus.value(
        f'sum(dycoke_requests_total{{policy="{setting}", outcome=~"done|cancelled"}})'
    )
    assert counted == jobs - rejected + NUM_WARM_UP_JOBS
    failed = f'sum(dycoke_requests_total{{policy="{setting}", outcome!~"done|cancelled"}})'
    assert loaded.prometheus.value(failed) == 0


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_prometheus_and_locust_agree_on_what_clients_waited(loaded: Loaded, setting: str) -> None:
    """The client's clock runs a little longer: it includes the connection and the last hop.

    Prometheus counts more answers: also those cancelled after a first token.
    """
    result = next(r for r in loaded.results if r.plan.compression == setting)
    selector = f'{{policy="{setting}"}}'
    metric = "dycoke_request_latency_seconds"
    ended = [entry for entry in result.locust if entry["method"] == "E2E"]
    done = sum(entry["num_requests"] for entry in ended)
    total_s = sum(entry["avg_response_time"] * entry["num_requests"] for entry in ended) / 1000
    counted = loaded.prometheus.value(f"{metric}_count{selector}")
    measured_s = loaded.prometheus.value(f"{metric}_sum{selector}")
    assert done <= counted <= done + NUM_WARM_UP_JOBS + cut_short(result)
    mean_s, their_mean_s = total_s / done, measured_s / counted
    assert mean_s == pytest.approx(their_mean_s, rel=0.35, abs=0.1 + result.max_stall_s)


def cut_short(result: Result) -> int:
    """Scenarios that stop an answer, which may have ended before."""
    return sum(result.arrivals.get(name, 0) for name in ("cancel", "leave"))


def test_metrics_carry_no_label_of_a_single_job(loaded: Loaded) -> None:
    """Labels have few values, and none that looks like an id, however many jobs there were."""
    allowed = {"__name__", "instance", "job", "model", "policy", "stage", "outcome", "reason"}
    allowed |= {"cache", "key", "kind", "le", "level", "met", "priority", "process", "requested"}
    allowed |= {"state"}
    samples = loaded.prometheus.query('{__name__=~"dycoke_.+"}')
    for sample in samples:
        metric: dict[str, Any] = sample["metric"]
        assert set(metric) <= allowed, metric
        assert not re.search(r"job_[0-9a-f]{8}|[0-9a-f]{16}", " ".join(metric.values())), metric
    assert len(samples) < 2000
