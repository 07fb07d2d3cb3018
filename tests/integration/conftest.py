"""A real Redis for the integration tests: one server for the session, a key prefix per test."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app import dies_with_parent
from app.__main__ import main
from app.embedded_redis import find_redis_server
from app.store.client import connect
from app.store.event_log import EventLog
from app.store.job_leases import JobLeases
from app.store.job_queue import JobQueue
from app.store.kept_sets import KeptSets
from app.store.keys import RedisKeys
from tests.integration.api import RunningApi, ScriptedWorker, running_api, scripted_worker
from tests.integration.api_keys import bearer
from tests.integration.jobs import leases_of
from tests.integration.lua_clock import LuaClock
from tests.integration.openai_client import client_of


class RedisServer:
    """A redis-server of a test's own, on a unix socket. What it wrote survives a restart."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "loglevel": "warning",
            "logfile": str(self.folder / "log"),
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        # Dies with the tests, however they end. Call this on the main thread: it dies with that.
        wrapper = (sys.executable, "-I", "-S", dies_with_parent.__file__, str(os.getpid()), "9")
        self._process = subprocess.Popen([*wrapper, find_redis_server(), *words])
        until = time.monotonic() + 20
        with SyncRedis(unix_socket_path=str(self.socket)) as client:
            while not _answers(client):
                assert time.monotonic() < until, (self.folder / "log").read_text()
                time.sleep(0.02)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """Ends the server cleanly."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(20)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(20)

    def pause(self) -> None:
        """Stops it from answering; connections stay open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


def _answers(client: SyncRedis) -> bool:
    try:
        return bool(client.ping())
    except (RedisError, OSError):
        return False


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """The session's server. Do not stop it: see `own_redis_server`."""
    yield from _running_server()


@pytest.fixture
def own_redis_server() -> Iterator[RedisServer]:
    """A server for one test, which may stop and start it."""
    yield from _running_server()


def _running_server() -> Iterator[RedisServer]:
    # Not pytest's tmp_path: a unix socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="dycoke-test-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        yield server
        server.stop()


@pytest.fixture
def keys() -> RedisKeys:
    return RedisKeys(f"test-{uuid.uuid4().hex[:12]}")


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = connect(redis_server.url)
    yield client
    await client.aclose()


@pytest.fixture
def queue(redis: Redis, keys: RedisKeys) -> JobQueue:
    return JobQueue(redis, keys, result_ttl_s=60)


@pytest.fixture
def log(redis: Redis, keys: RedisKeys) -> EventLog:
    return EventLog(redis, keys)


@pytest.fixture
async def leases(redis: Redis, keys: RedisKeys) -> JobLeases:
    leases = leases_of(redis, keys, "worker-a")
    await leases.ensure_group()
    return leases


@pytest.fixture
def other_leases(redis: Redis, keys: RedisKeys) -> JobLeases:
    return leases_of(redis, keys, "worker-b")


@pytest.fixture
def sets(redis: Redis, keys: RedisKeys) -> KeptSets:
    return KeptSets(redis, keys)


@pytest.fixture
async def clock(redis: Redis, keys: RedisKeys, monkeypatch: pytest.MonkeyPatch) -> LuaClock:
    """The clock that the store's scripts read."""
    return await LuaClock.start(redis, keys, monkeypatch)


# --- an API, and a worker that answers as a test says ---


@pytest.fixture
async def api(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> AsyncIterator[RunningApi]:
    async with running_api(redis_server.url, keys, tmp_path) as api:
        yield api


@pytest.fixture
async def worker(redis_server: RedisServer, keys: RedisKeys) -> AsyncIterator[ScriptedWorker]:
    async with scripted_worker(redis_server.url, keys) as worker:
        yield worker


@pytest.fixture
async def client(api: RunningApi) -> AsyncIterator[AsyncOpenAI]:
    async with client_of(api) as client:
        yield client


AddKey = Callable[..., dict[str, str]]


@pytest.fixture
def add_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> AddKey:
    """Stores a key as `python -m app keys add` does; returns the header that carries it."""
    monkeypatch.setenv("DYCOKE_DATA_DIR", str(tmp_path))

    def add(*words: str) -> dict[str, str]:
        assert main(["keys", "add", *words]) == 0
        return bearer(capsys.readouterr().out.strip())

    return add
