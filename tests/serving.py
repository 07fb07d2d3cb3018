"""A service of a checkout with the bundled model, on a free port, for as long as a block runs.

Imports nothing of the project: tests of clients use it in an environment without its dependencies.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
CLIP = ROOT / "dycoke_core" / "tiny" / "clips" / "shapes.mp4"
PATIENCE_S = 120.0


@contextmanager
def running_service(
    checkout: Path,
    environment: Mapping[str, str],
    *,
    command: str = "serve",
    python: str = sys.executable,
) -> Iterator[str]:
    """Yields its URL once it is ready.

    Args:
        command: `api` for an API alone, with workers from elsewhere.
        python: of an environment that has the project's dependencies.
    """
    with tempfile.TemporaryDirectory(prefix="dycoke-test-") as folder:
        env = {name: value for name, value in os.environ.items() if not name.startswith("DYCOKE_")}
        env |= {
            "DYCOKE_DATA_DIR": f"{folder}/data",
            "DYCOKE_PORT": "0",
            "DYCOKE_WORKER_METRICS_PORT": "0",
            "DYCOKE_WORKERS": "1",
            **environment,
        }
        log = Path(folder) / "log"
        with log.open("w") as file:
            arguments = [python, "-m", "app", command]
            process = subprocess.Popen(arguments, cwd=checkout, env=env, stderr=file)
        try:
            yield _wait_until_ready(process, log)
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def _wait_until_ready(process: "subprocess.Popen[bytes]", log: Path) -> str:
    until = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < until:
        found = re.findall(r"listening on (http://[^\s\"]+)", log.read_text())
        try:
            if found and httpx.get(f"{found[-1]}/readyz").is_success:
                return str(found[-1])
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError(log.read_text())
