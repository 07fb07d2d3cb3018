"""`python -m app serve`: everything real, and whichever process dies, the answer is whole."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.integration.workers import PATIENCE_S, ROOT, is_alive

CLIP = ROOT / "dycoke_core" / "tiny" / "clips" / "shapes.mp4"
NUM_TOKENS = 200

Event = tuple[str | None, dict[str, Any]]  # id, data


class Service:
    """One embedded service with its log."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._log = folder / "log"
        env = os.environ | {
            "DYCOKE_MODEL": str(model),  # answers that never end early
            "DYCOKE_DATA_DIR": str(folder / "data"),
            "DYCOKE_PORT": "0",
            "DYCOKE_WORKER_METRICS_PORT": "0",
            "DYCOKE_WORKERS": "1",
            "DYCOKE_API_PROCESSES": "2",
            "DYCOKE_LEASE_S": "2",
        }
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app", "serve"], cwd=ROOT, env=env, stderr=log
            )

    @property
    def url(self) -> str:
        """Where the API listens."""
        return re.findall(r"listening on (\S+)\"", self._log.read_text())[-1]

    def pid_of(self, child: str) -> int:
        pattern = rf'"child": "{child}", "child_pid": (\d+)'
        return int(re.findall(pattern, self._log.read_text())[-1])

    def names_of(self, kind: str) -> set[str]:
        """The children of a kind, or the child of that name."""
        names = re.findall(r'"child": "([\w-]+)", "child_pid"', self._log.read_text())
        return {name for name in names if name == kind or name.startswith(f"{kind}-")}

    def wait_until_ready(self) -> None:
        until = time.monotonic() + PATIENCE_S
        while not self._is_ready():
            assert self.process.poll() is None and time.monotonic() < until, self._log.read_text()
            time.sleep(0.1)

    def died(self) -> list[str]:
        """Children whose death the supervisor logged."""
        return re.findall(r'child died; restarting it", "child": "([\w-]+)"', self._log.read_text())

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz").status_code == 200
        except (IndexError, httpx.HTTPError):
            return False


@pytest.fixture(scope="module")
def service(random_checkpoint: Path) -> Iterator[Service]:
    with tempfile.TemporaryDirectory(prefix="dycoke-test-") as folder:
        service = Service(Path(folder), random_checkpoint)
        try:
            yield service
        finally:
            service.process.kill()
            service.process.wait(PATIENCE_S)


def events_of(response: httpx.Response) -> Iterator[Event]:
    event_id = None
    for line in response.iter_lines():
        if line.startswith("id: "):
            event_id = line[4:]
        elif line.startswith("data: "):
            yield event_id, json.loads(line[6:])
            event_id = None


def ask_and_kill(service: Service, child: str) -> list[Event]:
    """Posts a question and kills a child after some tokens; returns what the connection gave.

    With `api`, each of its processes: one of them has the connection.
    """
    fields = {
        "question": f"What happens when the {child} dies?",
        "max_tokens": str(NUM_TOKENS),
        "on_disconnect": "continue",
    }
    events: list[Event] = []
    is_killed = False
    with (
        CLIP.open("rb") as video,
        httpx.stream(
            "POST",
            f"{service.url}/v1/video/chat",
            files={"video": video},
            data=fields,
            timeout=PATIENCE_S,
        ) as response,
    ):
        try:
            for event in events_of(response):
                events.append(event)
                if not is_killed and event[1].get("index", 0) >= 5:
                    is_killed = True
                    for name in service.names_of(child):
                        os.kill(service.pid_of(name), signal.SIGKILL)
        except httpx.HTTPError:
            assert child == "api"
    return events


def resume(service: Service, events: list[Event]) -> list[Event]:
    job_id = events[0][1]["job_id"]
    last_id = [event_id for event_id, _ in events if event_id][-1]
    with httpx.stream(
        "GET",
        f"{service.url}/v1/jobs/{job_id}/events",
        headers={"Last-Event-ID": last_id},
        timeout=PATIENCE_S,
    ) as response:
        return list(events_of(response))


@pytest.mark.slow
@pytest.mark.parametrize("child", ["worker-0", "redis", "api"])
def test_answer_outlives_each_process(service: Service, child: str) -> None:
    service.wait_until_ready()
    events = ask_and_kill(service, child)
    if events[-1][1]["type"] != "done":
        service.wait_until_ready()
        events += resume(service, events)
    data = [data for _, data in events]
    tokens = [d for d in data if d["type"] == "token"]
    ends = [token["index"] + len(token["token_ids"]) for token in tokens]
    assert [token["index"] for token in tokens] == [0, *ends[:-1]], "none lost, none repeated"
    assert ends[-1] == NUM_TOKENS
    assert data[-1]["type"] == "done"
    assert data[-1]["attempts"] == (2 if child == "worker-0" else 1)
    assert data[-1]["text"] == "".join(d["text"] for d in data if d["type"] == "token")
    assert service.names_of(child) <= set(service.died())


@pytest.mark.slow
def test_service_stops_cleanly_and_leaves_nothing_behind(service: Service) -> None:
    service.wait_until_ready()
    family = psutil.Process(service.process.pid).children(recursive=True)
    assert len(family) >= 3
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(PATIENCE_S) == 0
    assert not [process for process in family if is_alive(process.pid)]
