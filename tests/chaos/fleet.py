"""The service under test: a Redis, two APIs (one process, and two on one port) and two pools of one
worker, each in processes of its own, each with a link to Redis of its own.

However a part ends, `up` starts it again, as systemd or Kubernetes would.
"""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from app import dies_with_parent
from tests.chaos.proxy import Link
from tests.integration.conftest import RedisServer
from tests.integration.workers import ROOT, is_alive

PATIENCE_S = 60.0
POLL_S = 0.05
NUM_APIS = NUM_POOLS = 2
PROCESSES_OF_APIS = (1, 2)
FORK_SERVER = "dycoke_core.video.fork_server"


@dataclass(eq=False)
class Part:
    """A part of the service, with one process at a time. A fault holds `lock`."""

    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    link: Link | None
    log: Path
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        # Dies with the run, however that ends. Called on the main thread: children die with it.
        wrapper = (sys.executable, "-I", "-S", dies_with_parent.__file__, str(os.getpid()), "9")
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [*wrapper, *self.argv],
                cwd=ROOT,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def send(self, signum: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(signum)

    async def ended(self, timeout_s: float = PATIENCE_S) -> int | None:
        """Its exit code; None if it does not end."""
        assert self._process is not None
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._process.poll() is None:
                    await asyncio.sleep(POLL_S)
        return self._process.poll()

    def processes(self) -> list[psutil.Process]:
        """Itself and those that it supervises."""
        assert self._process is not None
        main = psutil.Process(self._process.pid)
        return [main, *(child for child in _children(main) if not _is_fork_server(child))]

    def fork_servers(self) -> list[psutil.Process]:
        children = [child for process in self.processes() for child in _children(process)]
        return [child for child in children if _is_fork_server(child)]

    def readers(self) -> list[psutil.Process]:
        """The frame readers that are at work."""
        return [reader for server in self.fork_servers() for reader in _children(server)]

    def num_frame_buffers(self) -> int:
        """How many frame buffers, which are shared memory, it holds."""
        links = []
        for process in self.processes():
            for fd in Path(f"/proc/{process.pid}/fd").iterdir():
                with suppress(FileNotFoundError):
                    links.append(os.readlink(fd))
        return sum("memfd:frames" in link for link in links)


class Fleet:
    """Args:
    folder: for Redis, videos, logs and temporary files.
    """

    def __init__(self, folder: Path, *, lease_s: float) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.temporary = folder / "tmp"
        self.logs = folder / "logs"
        for path in (folder / "redis", self.data_dir, self.temporary, self.logs):
            path.mkdir()
        self.redis = RedisServer(folder / "redis")
        self.redis_lock = asyncio.Lock()
        self._lease_s = lease_s
        self.apis: list[Part] = []
        self.pools: list[Part] = []
        self.urls: list[str] = []

    @property
    def parts(self) -> list[Part]:
        return [*self.apis, *self.pools]

    async def start(self) -> None:
        self.redis.start()
        for number in range(NUM_APIS):
            port = free_port()
            self.urls.append(f"http://127.0.0.1:{port}")
            argv = (sys.executable, "-m", "app", "api")
            env = {
                "DYCOKE_PORT": str(port),
                "DYCOKE_API_PROCESSES": str(PROCESSES_OF_APIS[number]),
            }
            self.apis.append(await self._part(f"api-{number}", argv, env))
        for number in range(NUM_POOLS):
            argv = (sys.executable, "-m", "tests.chaos.pool")
            self.pools.append(await self._part(f"pool-{number}", argv, {"DYCOKE_WORKERS": "1"}))
        for part in self.parts:
            part.start()
        await self.wait_until_ready()

    async def wait_until_ready(self) -> None:
        """Waits until both APIs answer and both workers are there."""
        async with asyncio.timeout(2 * PATIENCE_S), httpx.AsyncClient(timeout=5.0) as client:
            for url in self.urls:
                while not await has_workers(client, url, NUM_POOLS):
                    await asyncio.sleep(0.2)

    async def up(self, part: Part) -> None:
        """Starts a part that has ended."""
        if not part.is_running:
            part.start()

    async def stop(self) -> dict[str, int | None]:
        """Stops everything but Redis in order; returns the exit codes."""
        codes = {}
        for group in (self.apis, self.pools):
            for part in group:
                if part.is_running:
                    part.send(signal.SIGTERM)
            for part in group:
                codes[part.name] = await part.ended()
        return codes

    async def close(self) -> None:
        for part in self.parts:
            if part.is_running:
                part.send(signal.SIGCONT)
                part.send(signal.SIGKILL)
                await part.ended()
            if part.link is not None:
                await part.link.close()
        self.redis.resume()
        self.redis.kill()

    async def _part(self, name: str, argv: tuple[str, ...], env: dict[str, str]) -> Part:
        link = Link(name, self.redis.socket)
        await link.open()
        settings = {
            "DYCOKE_REDIS_URL": link.url,
            "DYCOKE_MODEL": "tiny",
            "DYCOKE_DATA_DIR": str(self.data_dir),
            "DYCOKE_LEASE_S": str(self._lease_s),
            "DYCOKE_HEARTBEAT_S": "2",
            "DYCOKE_DRAIN_TIMEOUT_S": "1",
            "DYCOKE_WORKER_METRICS_PORT": "0",
            "DYCOKE_MAX_QUEUED_JOBS": "24",
            "DYCOKE_JOB_TIMEOUT_S": "1200",
            "TMPDIR": str(self.temporary),
        }
        return Part(name, argv, own_environment() | settings | env, link, self.logs / f"{name}.log")


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [child for child in process.children() if is_alive(child.pid)]
    except psutil.NoSuchProcess:
        return []


def children_of(pid: int) -> list[int]:
    """As the kernel lists them, at little cost."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _is_fork_server(process: psutil.Process) -> bool:
    try:
        return FORK_SERVER in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def own_environment() -> dict[str, str]:
    """This process's, without settings of the service."""
    return {name: v for name, v in os.environ.items() if not name.startswith("DYCOKE_")}


async def has_workers(client: httpx.AsyncClient, url: str, number: int) -> bool:
    try:
        reply = await client.get(f"{url}/v1/models")
    except httpx.TransportError:
        return False
    if reply.status_code != 200:
        return False
    return sum(model["num_workers"] for model in reply.json()["data"]) == number
