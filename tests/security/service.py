"""The API as a process, with keys and real frame readers, and a worker with a fake engine."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from app.keys.entries import Scope, StoredKey, digest_of, new_owner
from app.keys.file import KeyFile
from app.settings import Settings
from app.store.keys import RedisKeys
from tests.integration.test_service import wait_until
from tests.integration.workers import ROOT, WorkerProcess

PATIENCE_S = 60.0
CLIP = ROOT / "dycoke_core" / "tiny" / "clips" / "shapes.mp4"
NAMES = ("alice", "bob")
OPERATOR = "operator"  # whose key has all scopes


@dataclass(frozen=True)
class Service:
    url: str
    pid: int  # of the API
    log: Path
    clients: dict[str, httpx.Client]  # by key
    stranger: httpx.Client  # has none

    @property
    def alice(self) -> httpx.Client:
        return self.clients["alice"]

    @property
    def bob(self) -> httpx.Client:
        return self.clients["bob"]

    @property
    def operator(self) -> httpx.Client:
        return self.clients[OPERATOR]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def has_failed_inside(self) -> bool:
        """Whether the log reports an unexpected error."""
        return "Traceback" in self.log.read_text()


def secret(name: str) -> str:
    return f"{name}-{'0123456789' * 4}"


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret(name)}"}


def ask(client: httpx.Client, video_id: str, **fields: Any) -> dict[str, Any]:
    """Asks a question; returns the receipt."""
    body = {"question": "What?", "video_id": video_id, "stream": False, "max_tokens": 4, **fields}
    answer = client.post("/v1/video/chat", json=body)
    assert answer.status_code == 200, answer.text
    receipt: dict[str, Any] = answer.json()
    return receipt


def upload(client: httpx.Client, content: bytes | None = None) -> dict[str, Any]:
    answer = client.post("/v1/videos", files={"video": content or CLIP.read_bytes()})
    assert answer.status_code == 201, answer.text
    video: dict[str, Any] = answer.json()
    return video


@contextlib.contextmanager
def running(
    redis_url: str,
    keys: RedisKeys,
    folder: Path,
    *,
    names: Sequence[str] = NAMES,
    image_size: int | None = None,
    **settings: str,
) -> Iterator[Service]:
    """An API on a free port, ready to answer; both processes end with the block.

    Args:
        names: of keys, beside which there is the operator's; none: everybody is let in.
        image_size: pixels, of the frames that the worker wants.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if not name.startswith("DYCOKE_")}
    env |= {
        "DYCOKE_REDIS_URL": redis_url,
        "DYCOKE_REDIS_PREFIX": keys.prefix,
        "DYCOKE_DATA_DIR": str(folder / "data"),
        "DYCOKE_PORT": str(port),
        "DYCOKE_MAX_UPLOAD_BYTES": str(4 * 2**20),
        "DYCOKE_MAX_UPLOADS": "64",
        **settings,
    }
    if names:
        env["DYCOKE_API_KEYS"] = ",".join(f"{name}:{secret(name)}" for name in names)
        store_key(folder / "data", OPERATOR)
        names = [*names, OPERATOR]
    log, url = folder / "log", f"http://127.0.0.1:{port}"
    worker = Settings(redis_url=redis_url, redis_prefix=keys.prefix, model="tiny")
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-m", "app", "api"], cwd=ROOT, env=env, stderr=output
        ) as process,
        WorkerProcess(worker.model_copy(update={"worker_metrics_port": 0}), image_size=image_size),
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.wait, PATIENCE_S)
        stack.callback(process.terminate)

        def client(**options: Any) -> httpx.Client:
            made = httpx.Client(base_url=url, timeout=PATIENCE_S, **options)
            return stack.enter_context(made)

        stranger = client()

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(httpx.TransportError):
                return stranger.get("/readyz").status_code == 200
            return False

        wait_until(is_ready)
        clients = {name: client(headers=bearer(name)) for name in names}
        yield Service(url, process.pid, log, clients, stranger)


def store_key(data_dir: Path, name: str) -> None:
    """A key with all scopes, as `python -m app keys add` stores it."""
    with KeyFile(data_dir).change() as change:
        key = StoredKey(
            owner=new_owner(),
            name=name,
            digest=digest_of(secret(name)),
            scopes=frozenset(Scope),
            created_at_s=time.time(),
        )
        change.put(key, "add")


def metric(service: Service, sample: str) -> float:
    """A value of the metrics page."""
    page = service.stranger.get("/metrics").text
    return sum(float(value) for value in re.findall(rf"^{sample}\S* (\S+)$", page, re.MULTILINE))
