"""Services for the browser: the whole one with the bundled model, and a slow one whose worker is
fake and sleeps as a question says."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

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
    with (
        _process("tests.integration.fake_worker", "0", environment=environment),
        running_service(ROOT, environment, command="api") as url,
    ):
        yield url


@contextmanager
def pools(redis_url: str, checkpoints: Sequence[Path]) -> Iterator[str]:
    """An API, and for each checkpoint a pool of one worker; yields once all are served."""
    environment = {
        "DYCOKE_REDIS_URL": redis_url,
        "DYCOKE_REDIS_PREFIX": "pools",
        "DYCOKE_KV_CACHE_BYTES": str(2**26),
        "DYCOKE_WORKERS": "1",
        "DYCOKE_WORKER_THREADS": "1",
    }
    with ExitStack() as stack:
        for checkpoint in checkpoints:
            own = {**environment, "DYCOKE_MODEL": str(checkpoint)}
            stack.enter_context(_process("app", "worker", environment=own))
        url = stack.enter_context(running_service(ROOT, environment, command="api"))
        until = time.monotonic() + PATIENCE_S
        while len(httpx.get(f"{url}/v1/models").json()["data"]) < len(checkpoints):
            assert time.monotonic() < until, "not all models are served"
            time.sleep(0.1)
        yield url


@contextmanager
def _process(module: str, *arguments: str, environment: dict[str, str]) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "DYCOKE_WORKER_METRICS_PORT": "0", **environment},
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
