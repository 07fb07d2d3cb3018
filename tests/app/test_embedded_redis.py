"""The embedded Redis under the supervisor: one owner, data kept, restarted, stopped on request."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from app import embedded_redis
from app.embedded_redis import EmbeddedRedis, EmbeddedRedisError, find_redis_server, socket_path
from app.errors import StoreUnavailableError
from app.store.client import connect, store_call
from app.supervisor import EXIT_BAD_SETTINGS, RestartPolicy, Supervisor
from tests.integration.workers import PATIENCE_S, ROOT, is_alive, wait_until

pytestmark = pytest.mark.flaky(reruns=1)  # on a machine that stalls, as tests/integration


@pytest.fixture
def data_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dycoke-test-") as folder:
        yield Path(folder)


@asynccontextmanager
async def supervised(data_dir: Path) -> AsyncIterator[Redis]:
    embedded = EmbeddedRedis(data_dir, max_frame_store_bytes=2**20)
    specs = [embedded.child_spec(stop_order=0)]
    restarts = RestartPolicy(first_wait_s=0.02)
    supervisor = asyncio.create_task(Supervisor(specs, restarts=restarts).run())
    redis = connect(embedded.url)
    await wait_for_redis(redis)
    yield redis
    await redis.aclose()
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(PATIENCE_S):
        assert await supervisor == 0
    embedded.close()


async def wait_for_redis(redis: Redis) -> None:
    async def answers() -> bool:
        try:
            async with store_call():
                return bool(await redis.ping())
        except StoreUnavailableError:
            return False

    await wait_until(answers)


async def test_data_survives_a_clean_stop(data_dir: Path) -> None:
    async with supervised(data_dir) as redis:
        await redis.set("a", "b")
    async with supervised(data_dir) as redis:
        assert await redis.get("a") == b"b"


async def test_server_that_dies_comes_back_with_its_data(data_dir: Path) -> None:
    async with supervised(data_dir) as redis:
        await redis.set("a", "b")
        await redis.config_set("appendfsync", "always")
        await redis.set("c", "d")
        pid = (await redis.info("server"))["process_id"]
        os.kill(pid, signal.SIGKILL)
        await wait_for_redis(redis)
        assert await redis.mget("a", "c") == [b"b", b"d"]
        assert (await redis.info("server"))["process_id"] != pid


async def test_server_is_private_and_never_evicts(data_dir: Path) -> None:
    async with supervised(data_dir) as redis:
        assert (await redis.config_get("port"))["port"] == "0"
        assert (await redis.config_get("maxmemory-policy"))["maxmemory-policy"] == "noeviction"
        assert int((await redis.config_get("maxmemory"))["maxmemory"]) > 2**20
        mode = (data_dir / "redis" / "redis.sock").stat().st_mode
        assert stat.S_IMODE(mode) == 0o700
        assert stat.S_IMODE((data_dir / "redis").stat().st_mode) == 0o700


def test_second_owner_of_a_data_folder_is_refused(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_redis, "LOCK_TIMEOUT_S", 0.1)
    first = EmbeddedRedis(data_dir, max_frame_store_bytes=2**20)
    with pytest.raises(EmbeddedRedisError, match="in use by another service"):
        EmbeddedRedis(data_dir, max_frame_store_bytes=2**20)
    first.close()
    EmbeddedRedis(data_dir, max_frame_store_bytes=2**20).close()


async def test_second_service_says_so_in_one_line(data_dir: Path) -> None:
    async with supervised(data_dir):
        second = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "app", "serve"],
            cwd=ROOT,
            env=os.environ | {"DYCOKE_DATA_DIR": str(data_dir), "DYCOKE_DEVICE": "cpu"},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
    assert second.returncode == EXIT_BAD_SETTINGS
    assert len(second.stderr.splitlines()) == 1
    assert "DYCOKE_DATA_DIR" in second.stderr


async def test_folder_stays_locked_while_an_orphaned_server_writes(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_redis, "LOCK_TIMEOUT_S", 0.1)
    code = (
        "import asyncio, sys; from pathlib import Path\n"
        "from app.embedded_redis import EmbeddedRedis; from app.supervisor import Supervisor\n"
        "redis = EmbeddedRedis(Path(sys.argv[1]), max_frame_store_bytes=2**20)\n"
        "asyncio.run(Supervisor([redis.child_spec(stop_order=0)]).run())"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(data_dir)], cwd=ROOT)
    redis = connect(f"unix://{data_dir}/redis/redis.sock")
    await wait_for_redis(redis)
    pid = (await redis.info("server"))["process_id"]
    await redis.aclose()
    os.kill(pid, signal.SIGSTOP)  # it cannot go yet
    owner.kill()
    owner.wait(PATIENCE_S)
    with pytest.raises(EmbeddedRedisError):
        EmbeddedRedis(data_dir, max_frame_store_bytes=2**20)
    os.kill(pid, signal.SIGCONT)

    async def is_gone() -> bool:
        return not is_alive(pid)

    await wait_until(is_gone)
    monkeypatch.setattr(embedded_redis, "LOCK_TIMEOUT_S", 10.0)
    EmbeddedRedis(data_dir, max_frame_store_bytes=2**20).close()


def test_long_folder_gets_a_socket_elsewhere(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(data_dir))
    assert socket_path(data_dir) == data_dir / "redis.sock"
    deep = tmp_path / ("x" * 100)
    path = socket_path(deep)
    assert path.parent.parent == data_dir
    assert len(os.fsencode(path)) <= 107
    assert path == socket_path(deep) != socket_path(tmp_path / ("y" * 100))
    path.parent.chmod(0o755)
    with pytest.raises(EmbeddedRedisError):
        socket_path(deep)


def test_without_any_redis_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded_redis, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedRedisError, match="valkey-server"):
        find_redis_server()
    server = tmp_path / "valkey-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    assert find_redis_server() == str(server)
