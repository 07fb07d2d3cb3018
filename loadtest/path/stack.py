"""One checkout's service, a process for each part, and the CPU time of each.

Each checkout runs with the optional speed-ups (uvloop, httptools, hiredis) that its own
constraints.txt installs, and without the others, although both share one environment.
"""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from redis import Redis
from redis.exceptions import RedisError

from app.embedded_redis import find_redis_server
from loadtest.client import Service

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
MAX_STREAMS = 600
PARTS = ("worker", "redis", "api")
SPEED_UPS = ("uvloop", "httptools", "hiredis")
CLIP = Path(__file__).parents[2] / "dycoke_core" / "tiny" / "clips" / "shapes.mp4"
WORKER = Path(__file__).with_name("worker.py")
# An import of a module that sys.modules maps to None fails.
_LAUNCH = (
    "import runpy, sys; hidden, target = sys.argv[1:3]; del sys.argv[1:3];"
    "sys.modules.update(dict.fromkeys(filter(None, hidden.split(','))));"
    "sys.argv[0] = target;"
    "(runpy.run_path if target.endswith('.py') else runpy.run_module)(target, run_name='__main__')"
)

Cpu = Mapping[str, float]


class Stack:
    """Args:
    folder: for its Redis, its data and its logs.
    """

    def __init__(self, checkout: Path, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._steps_file = folder / "steps.json"
        folder.mkdir()
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        socket_path = folder / "redis.sock"
        environment = {n: v for n, v in os.environ.items() if not n.startswith("DYCOKE_")} | {
            "PYTHONPATH": str(checkout),
            "PATH_STEPS_FILE": str(self._steps_file),
            "DYCOKE_REDIS_URL": f"unix://{socket_path}",
            "DYCOKE_DATA_DIR": str(folder / "data"),
            "DYCOKE_PORT": str(port),
            "DYCOKE_WORKER_METRICS_PORT": "0",
            "DYCOKE_MAX_STREAMS": str(MAX_STREAMS),
            "DYCOKE_MAX_RUNNING_JOBS": str(MAX_STREAMS),
            "DYCOKE_MAX_QUEUED_JOBS": str(MAX_STREAMS),
            "DYCOKE_MAX_TOKENS": "1000000",
        }
        python = [sys.executable, "-P", "-c", _LAUNCH, ",".join(_hidden(checkout))]
        redis = [
            find_redis_server(),
            *("--port", "0", "--unixsocket", str(socket_path), "--dir", str(folder)),
            *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
            *("--maxmemory-policy", "noeviction"),
        ]
        self._processes: dict[str, psutil.Process] = {}
        self._idle: Cpu = {}

        def start(name: str, argv: list[str]) -> None:
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            process = psutil.Popen(
                argv, cwd=checkout, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            stack.callback(_stop, process)
            self._processes[name] = process

        start("redis", redis)
        self._redis = Redis(unix_socket_path=str(socket_path))
        stack.callback(self._redis.close)
        self._wait_until("Redis answers", self._has_redis)
        start("worker", [*python, str(WORKER), "0"])
        start("api", [*python, "app", "api"])
        self._wait_until("the service is ready", self._is_ready)
        self.video_id = Service(self.url).upload(CLIP.read_bytes())

    def measure_idle(self, seconds: float) -> None:
        """Measures the CPU time that idle processes use, over `seconds`."""
        before = self.cpu_s()
        time.sleep(seconds)
        spent = self.spent_since(before)
        self._idle = {name: cpu_s / seconds for name, cpu_s in spent.items() if name != "at_s"}

    def spent_since(self, before: Cpu) -> dict[str, float]:
        """CPU seconds by part since `cpu_s` returned `before`, minus the idle use."""
        now = self.cpu_s()
        passed_s = now["at_s"] - before["at_s"]
        return {
            name: max(0.0, now[name] - before[name] - passed_s * self._idle.get(name, 0.0))
            for name in now
        }

    def cpu_s(self) -> Cpu:
        """CPU seconds so far, by part, and when that was; `loop` is the part of the worker's that
        its event loop used."""
        used = {name: _cpu_s(self._processes[name]) for name in PARTS}
        worker = self._processes["worker"]
        main_thread = next(thread for thread in worker.threads() if thread.id == worker.pid)
        loop_s = main_thread.user_time + main_thread.system_time
        return used | {"loop": loop_s, "at_s": time.monotonic()}

    def steps(self) -> dict[str, Any]:
        """What the engine has recorded of its steps, up to half a second ago."""
        self._wait_until("the engine has noted its steps", self._steps_file.exists)
        noted: dict[str, Any] = json.loads(self._steps_file.read_text())
        return noted

    def wait_until_idle(self) -> None:
        """Waits until every job has ended, then deletes them."""
        self._wait_until("all jobs have ended", lambda: not self._redis.zcard("dycoke:live"))
        time.sleep(1.0)

    def _has_redis(self) -> bool:
        try:
            return bool(self._redis.ping())
        except RedisError:
            return False

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def _wait_until(self, what: str, is_so: Callable[[], bool]) -> None:
        until = time.monotonic() + START_TIMEOUT_S
        while not is_so():
            ended = [name for name, p in self._processes.items() if p.poll() is not None]
            if ended or time.monotonic() > until:
                logs = "\n".join(log.read_text()[-2000:] for log in self._folder.glob("*.log"))
                raise RuntimeError(f"waited in vain until {what}; ended: {ended}\n{logs}")
            time.sleep(0.1)


class Clients:
    """The clients' process, which serves every stack in turn."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadtest.path.client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def say(self, **order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the clients' process ended with {self._process.wait()}")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(STOP_TIMEOUT_S)


@contextlib.contextmanager
def running_stacks(checkouts: Mapping[str, Path], folder: Path) -> Iterator[dict[str, Stack]]:
    with contextlib.ExitStack() as stack:
        yield {n: Stack(path, folder / n, stack) for n, path in checkouts.items()}


def _hidden(checkout: Path) -> list[str]:
    """The speed-ups that are installed here but not in that checkout's constraints."""
    pinned = (checkout / "constraints.txt").read_text().splitlines()
    names = {line.partition("==")[0].lower() for line in pinned}
    return [n for n in SPEED_UPS if n not in names and importlib.util.find_spec(n) is not None]


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _stop(process: psutil.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except psutil.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
