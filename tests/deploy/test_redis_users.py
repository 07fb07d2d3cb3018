"""The users of deploy/redis: a real redis-server with them, and the service's jobs through it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from app import dies_with_parent
from app.embedded_redis import find_redis_server
from app.store.keys import RedisKeys
from tests.deploy.prometheus import DEPLOY
from tests.integration.api import CLIP, RunningApi, parse_events, running_api
from tests.integration.workers import WorkerProcess, wait_until

FOLDER = DEPLOY / "redis"
LUA = DEPLOY.parent / "app" / "store" / "lua"
PASSWORD, KEDA_PASSWORD, ADMIN_PASSWORD = ("x" * 31 + letter for letter in "ska")
KEYS = RedisKeys()


@dataclass(frozen=True)
class Server:
    socket: Path

    def url(self, user: str, password: str) -> str:
        return f"unix://{user}:{password}@{self.socket}"

    def client(self, user: str, password: str) -> Redis:
        return Redis.from_url(self.url(user, password), protocol=2)


def start(folder: Path, **variables: str) -> subprocess.Popen[bytes]:
    """As the compose file does, with a socket instead of a port."""
    binaries = folder / "bin"
    binaries.mkdir(exist_ok=True)
    with_name = binaries / "redis-server"
    if not with_name.exists():
        with_name.symlink_to(find_redis_server())
    command = ["sh", str(folder / "start.sh"), "--port", "0", "--dir", str(folder)]
    command += ["--unixsocket", str(folder / "socket"), "--save", "", "--loglevel", "warning"]
    wrapper = (sys.executable, "-I", "-S", dies_with_parent.__file__, str(os.getpid()), "9")
    environment = {"PATH": f"{binaries}:{os.environ['PATH']}", "ACL_FILE": str(folder / "acl")}
    return subprocess.Popen([*wrapper, *command], env=environment | variables)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """With an administrator besides the users under test, to see what they were denied."""
    with tempfile.TemporaryDirectory(prefix="dycoke-test-") as name:
        folder = Path(name)
        for file in FOLDER.iterdir():
            shutil.copy(file, folder)
        with (folder / "users.acl").open("a") as users:
            users.write(f"user admin on >{ADMIN_PASSWORD} ~* &* +@all\n")
        process = start(folder, REDIS_PASSWORD=PASSWORD, KEDA_PASSWORD=KEDA_PASSWORD)
        server = Server(folder / "socket")
        until = time.monotonic() + 60
        while not answers(server):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        yield server
        process.terminate()
        process.wait(60)


def answers(server: Server) -> bool:
    try:
        return bool(server.client("admin", ADMIN_PASSWORD).ping())
    except (RedisError, OSError):
        return False


def commands_of(user: str) -> set[str]:
    lines = (FOLDER / "users.acl").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"user {user} ")]
    return {word[1:] for word in line.split() if word.startswith("+")}


@asynccontextmanager
async def serving(server: Server, folder: Path) -> AsyncIterator[RunningApi]:
    """An API and a worker process, both as the service's user."""
    url = server.url("dycoke", PASSWORD)
    async with running_api(url, KEYS, folder) as api:
        with WorkerProcess(api.settings.model_copy(update={"model": "tiny"})):

            async def is_ready() -> bool:
                return (await api.client.get("/readyz")).status_code == 200

            await wait_until(is_ready)
            yield api


async def test_the_service_needs_no_other_command(server: Server, tmp_path: Path) -> None:
    admin = server.client("admin", ADMIN_PASSWORD)
    admin.acl_log_reset()
    async with serving(server, tmp_path) as api:
        answer = await api.post()
        done = parse_events(answer.text)[-1]
        assert done.name == "done", answer.text
        job, video = done.data["job_id"], done.data["video_id"]
        for path in (f"jobs/{job}", f"jobs/{job}/events", "usage", "models", "files"):
            assert (await api.client.get(f"/v1/{path}")).status_code == 200, path
        again = await api.post(clip=None, video_id=video, stream=False, num_frames=4)
        assert again.status_code == 200
        async with api.posting(question="sleep:60") as slow:
            url = f"/v1/jobs/{slow.headers['x-job-id']}"
            assert (await api.client.delete(url)).json()["state"] == "cancelled"
        assert (await api.client.delete(f"/v1/videos/{video}")).status_code == 204
        assert (await api.client.post("/v1/videos", files={"video": CLIP})).status_code == 201
    denied = {entry["object"] for entry in admin.acl_log()}
    assert denied <= {"client", "client|setinfo"}, "the client's own name, which it can do without"


def test_every_command_of_the_scripts_is_allowed() -> None:
    used = set()
    for script in LUA.glob("*.lua"):
        found = re.findall(r"redis\.p?call\(\s*'([A-Z]+)'(?:,\s*'([A-Z]+)')?", script.read_text())
        for name, second in found:
            has_subcommands = name in ("MEMORY", "XGROUP", "XINFO")
            used.add(f"{name}|{second}".lower() if has_subcommands else name.lower())
    assert used and used <= commands_of("dycoke")


def test_every_command_of_the_sources_is_allowed() -> None:
    """What the client's methods call, besides scripts."""
    names = {
        "delete": "del", "script_load": "script|load", "xgroup_create": "xgroup|create",
        "pubsub": "subscribe", "execute": "exec", "pipeline": "multi", "aclose": "ping",
    }  # fmt: skip
    used = set()
    for source in LUA.parent.glob("*.py"):
        for called in re.findall(r"\b_?(?:redis|pipeline)\.([a-z_]+)\(", source.read_text()):
            used.add(names.get(called, called))
    assert {"exec", "xread", "get"} <= used <= commands_of("dycoke")


@pytest.mark.parametrize(
    "command",
    [
        "CONFIG GET *", "KEYS *", "SCAN 0", "FLUSHALL", "EVAL 1 0", "SCRIPT FLUSH", "ACL LIST",
        "DEBUG SLEEP 0", "SHUTDOWN", "SAVE", "REPLICAOF a 1", "MODULE LIST", "MONITOR",
        "CLIENT LIST", "INFO", "RESTORE dycoke:a 0 b", "GET other:a", "SET dycokeother:a b",
        "PUBLISH other a", "SUBSCRIBE other", "PSUBSCRIBE *", "MIGRATE a 1 dycoke:a 0 1",
    ],
)  # fmt: skip
def test_the_services_user_may_do_nothing_else(server: Server, command: str) -> None:
    with pytest.raises(NoPermissionError):
        server.client("dycoke", PASSWORD).execute_command(*command.split())


def test_keda_may_ask_how_long_a_queue_is_and_nothing_else(server: Server) -> None:
    keda = server.client("keda", KEDA_PASSWORD)
    assert keda.xlen(KEYS.jobs("none")) == 0
    for command in (("GET", KEYS.live), ("XLEN", KEYS.dead), ("XRANGE", KEYS.jobs("a"), "-", "+")):
        with pytest.raises(NoPermissionError):
            keda.execute_command(*command)


def test_nobody_gets_in_without_a_password(server: Server) -> None:
    with pytest.raises(AuthenticationError):
        Redis(unix_socket_path=str(server.socket), protocol=2).ping()
    for user, password in (("dycoke", KEDA_PASSWORD), ("default", ""), ("keda", PASSWORD)):
        with pytest.raises(AuthenticationError):
            server.client(user, password).ping()


@pytest.mark.parametrize(
    ("variables", "said"),
    [({}, b"REDIS_PASSWORD"), ({"REDIS_PASSWORD": "short"}, b"fewer than 32")],
)
def test_no_server_starts_without_a_good_password(
    variables: dict[str, str], said: bytes, tmp_path: Path
) -> None:
    environment = {"PATH": os.environ["PATH"], "ACL_FILE": str(tmp_path / "acl"), **variables}
    command = ["sh", str(FOLDER / "start.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 2 and said in done.stderr
    assert not (tmp_path / "acl").exists()
