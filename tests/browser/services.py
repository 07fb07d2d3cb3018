"""Services for the browser: the whole one with the bundled model, and a slow one whose worker is
fake and sleeps as a question says."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.serving import PATIENCE_S, running_service

ROOT = Path(__file__).parent.parent.parent


@contextmanager
def whole_service() -> Iterator[str]:
    """What `make serve` starts; yields its address once it answers."""
    with running_service(ROOT, {}) as url:
        yield url


@contextmanager
def slow_service(redis_url: str, **settings: str) -> Iterator[str]:
    """An API, and a worker with a fake engine that runs one job at a time."""
    environment = {
        "DYCOKE_REDIS_URL": redis_url,
        "DYCOKE_MODEL": "tiny",
        "DYCOKE_MAX_RUNNING_JOBS": "1",
        **settings,
    }
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.fake_worker", "0"],
        cwd=ROOT,
        env={**os.environ, "DYCOKE_WORKER_METRICS_PORT": "0", **environment},
        stderr=subprocess.DEVNULL,
    )
    try:
        with running_service(ROOT, environment, command="api") as url:
            yield url
    finally:
        worker.terminate()
        worker.wait(PATIENCE_S)
