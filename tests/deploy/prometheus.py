"""A real Prometheus for the tests, with the configuration and the rules that are deployed."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from app import dies_with_parent

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
CONFIG = DEPLOY / "prometheus" / "prometheus.yml"
RULES = DEPLOY / "prometheus" / "rules"
START_TIMEOUT_S = 60.0


def tool(name: str) -> str:
    """Where a tool is. Without it a test is skipped, but not in CI (`.ci/run` installs it)."""
    if path := shutil.which(name):
        return path
    message = f"{name} is not installed (Debian: apt-get install prometheus)"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


class Prometheus:
    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Evaluates an expression now; returns its samples."""
        samples: list[dict[str, Any]] = self._get("query", query=expr)["result"]
        return samples

    def value(self, expr: str) -> float:
        (sample,) = self.query(expr)
        return float(sample["value"][1])

    def healthy_targets(self) -> list[str]:
        """Jobs of the targets whose last scrape worked."""
        targets = self._get("targets", state="active")["activeTargets"]
        return [t["labels"]["job"] for t in targets if t["health"] == "up"]

    def _get(self, path: str, **parameters: str) -> Any:
        words = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self._url}/api/v1/{path}?{words}", timeout=30) as response:
            return json.load(response)["data"]


@contextlib.contextmanager
def running_prometheus(
    folder: Path, targets: Mapping[str, Sequence[str]], *, scrape_interval: str
) -> Iterator[Prometheus]:
    """Args:
    targets: for each job of the deployed configuration, what stands for its discovery.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(_config(targets, scrape_interval)))
    argv = (
        *(sys.executable, "-I", "-S", dies_with_parent.__file__, str(os.getpid()), "9"),
        *(tool("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"),
        *(f"--web.listen-address={address}", "--log.level=warn"),
    )
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stderr=output, stdout=output)
    try:
        prometheus = Prometheus(f"http://{address}")
        _wait_until_scraping(prometheus, targets, log)
        yield prometheus
    finally:
        process.kill()
        process.wait()


def _config(targets: Mapping[str, Sequence[str]], scrape_interval: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": scrape_interval, "evaluation_interval": scrape_interval}
    config["rule_files"] = [str(path) for path in sorted(RULES.glob("*.yml"))]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    config["scrape_configs"] = [
        {"job_name": name, "static_configs": [{"targets": list(addresses)}]}
        | {k: v for k, v in jobs[name].items() if not k.endswith("_configs") and k != "job_name"}
        for name, addresses in targets.items()
    ]
    return config


def _wait_until_scraping(
    prometheus: Prometheus, targets: Mapping[str, Sequence[str]], log: Path
) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    expected = sorted(job for job, addresses in targets.items() for _ in addresses)
    while True:
        with contextlib.suppress(OSError):
            if sorted(prometheus.healthy_targets()) == expected:
                return
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.2)
