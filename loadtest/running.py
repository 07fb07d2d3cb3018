"""Starts a service to put load on: `python -m app serve` in a child, in its own folder."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class RunningService:
    url: str
    log: Path

    def worker_ports(self) -> list[int]:
        """The ports of the workers' metrics."""
        lines = (line for line in self.log.read_text().splitlines() if "serving metrics" in line)
        return [int(json.loads(line)["port"]) for line in lines]


@contextlib.contextmanager
def running_service(
    folder: Path, settings: Mapping[str, str] | None = None
) -> Iterator[RunningService]:
    """Starts a service, waits until it is ready, and stops it at the end.

    Raises:
        RuntimeError: it ended or was not ready in time; the message has the end of its log.
    """
    port = _free_port()
    environment = {n: v for n, v in os.environ.items() if not n.startswith("DYCOKE_")}
    environment |= {
        "DYCOKE_PORT": str(port),
        "DYCOKE_DATA_DIR": str(folder / "data"),
        "DYCOKE_WORKER_METRICS_PORT": "0",
        **(settings or {}),
    }
    service = RunningService(f"http://127.0.0.1:{port}", folder / "service.log")
    with service.log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve"],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_ready(service, process)
        yield service
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def model_settings(name: str, folder: Path) -> dict[str, str]:
    """The service's settings for a model.

    Args:
        name: a directory, a hub id, `medium` (random weights, written into the folder), or "" for
            the bundled one.
    """
    if name == "medium":
        from loadtest.geometry import write_medium_checkpoint

        path = folder / "dycoke-medium"
        write_medium_checkpoint(path)
        name = str(path)
    return {"DYCOKE_MODEL": name} if name else {}


def _wait_until_ready(service: RunningService, process: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while not _is_ready(service.url):
        if process.poll() is not None or time.monotonic() > until:
            tail = "\n".join(service.log.read_text().splitlines()[-20:])
            raise RuntimeError(f"the service did not get ready:\n{tail}")
        time.sleep(0.2)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
