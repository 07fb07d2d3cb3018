"""Several API processes on one port: one dies, all drain, and their metrics add up."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.store.keys import RedisKeys
from tests.integration.api import (
    MODEL,
    EventReader,
    ScriptedWorker,
    parse_events,
)
from tests.integration.conftest import RedisServer
from tests.integration.workers import PATIENCE_S, ROOT, wait_until

CLIP = ROOT / "dycoke_core" / "tiny" / "clips" / "shapes.mp4"
FIELDS = {"question": "What happens?"}
NUM_STREAMS = 8


class Processes:
    """`python -m app api` with two processes."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self._log = log
        self.client = httpx.AsyncClient(
            timeout=PATIENCE_S, limits=httpx.Limits(max_keepalive_connections=0)
        )

    @property
    def entries(self) -> list[dict[str, object]]:
        lines = self._log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    @property
    def url(self) -> str:
        return re.findall(r"listening on (\S+)\"", self._log.read_text())[-1]

    def pid_of(self, number: int) -> int:
        name = f"api-{number}"
        started = [e for e in self.entries if e.get("child") == name and "child_pid" in e]
        return int(str(started[-1]["child_pid"]))

    async def get(self, path: str, **options: object) -> httpx.Response:
        return await self.client.get(f"{self.url}{path}", **options)  # type: ignore[arg-type]

    def stream_request(self, video_id: str) -> httpx.Request:
        body = {**FIELDS, "video_id": video_id}
        return self.client.build_request("POST", f"{self.url}/v1/video/chat", json=body)

    async def post(self, video_id: str) -> httpx.Response:
        body = {**FIELDS, "video_id": video_id, "stream": False}
        return await self.client.post(f"{self.url}/v1/video/chat", json=body)

    async def upload(self) -> str:
        files = {"video": CLIP.read_bytes()}
        reply = await self.client.post(f"{self.url}/v1/videos", files=files)
        return str(reply.json()["video_id"])

    async def values(self, sample: str, **labels: str) -> dict[str, float]:
        """A metric's values by process."""
        page = (await self.get("/metrics")).text
        return {
            s.labels["process"]: s.value
            for family in text_string_to_metric_families(page)
            for s in family.samples
            if s.name == sample and labels.items() <= s.labels.items()
        }

    async def wait_for(self, sample: str, **expected: float) -> None:
        """Waits for a metric's values of the processes p0 and p1."""
        wanted = {name.removeprefix("p"): value for name, value in expected.items()}

        async def is_there() -> bool:
            return await self.values(sample) == wanted

        await wait_until(is_there)

    async def wait_for_end(self) -> int:
        return await asyncio.to_thread(self.process.wait, PATIENCE_S)


@asynccontextmanager
async def running(
    redis_url: str, keys: RedisKeys, folder: Path, **settings: str
) -> AsyncIterator[Processes]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("DYCOKE_")}
    env |= {
        "DYCOKE_REDIS_URL": redis_url,
        "DYCOKE_REDIS_PREFIX": keys.prefix,
        "DYCOKE_DATA_DIR": str(folder / "data"),
        "DYCOKE_PORT": "0",
        "DYCOKE_API_PROCESSES": "2",
        **settings,
    }
    log = folder / "log"
    with log.open("wb") as output:
        argv = [sys.executable, "-m", "app", "api"]
        processes = Processes(subprocess.Popen(argv, env=env, stderr=output), log)
    try:
        await wait_until(lambda: _are_listening(processes, 2))
        await processes.wait_for("dycoke_api_process_up", p0=1.0, p1=1.0)
        yield processes
    finally:
        await processes.client.aclose()
        if processes.process.poll() is None:
            processes.process.kill()
            processes.process.wait(PATIENCE_S)


async def _are_listening(processes: Processes, count: int) -> bool:
    assert processes.process.poll() is None, processes.entries
    messages = [str(entry["message"]) for entry in processes.entries]
    return sum("listening on" in message for message in messages) >= count


@pytest.fixture
async def processes(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> AsyncIterator[Processes]:
    async with running(
        redis_server.url, keys, tmp_path, DYCOKE_MAX_STREAMS=str(NUM_STREAMS + 1)
    ) as processes:
        yield processes


@asynccontextmanager
async def streams_in_both(
    processes: Processes, video_id: str
) -> AsyncIterator[list[httpx.Response]]:
    """Open answers, some in each process."""
    requests = [processes.stream_request(video_id) for _ in range(NUM_STREAMS)]
    responses = [await processes.client.send(request, stream=True) for request in requests]
    try:
        num_open = await processes.values("dycoke_open_streams")
        assert sum(num_open.values()) == NUM_STREAMS and all(num_open.values())
        yield responses
    finally:
        for response in responses:
            await response.aclose()


async def answer_all(worker: ScriptedWorker, responses: list[httpx.Response]) -> None:
    for _ in responses:
        await worker.answer()
    for response in responses:
        await response.aread()
        assert parse_events(response.text)[-1].name == "done"


async def test_one_port_one_limit_and_metrics_that_add_up(
    processes: Processes, worker: ScriptedWorker
) -> None:
    video_id = await processes.upload()
    async with streams_in_both(processes, video_id) as responses:
        last = await processes.client.send(processes.stream_request(video_id), stream=True)
        refused = await processes.post(video_id)
        assert (refused.status_code, refused.json()["code"]) == (503, "too_many_streams")
        num_open = await processes.values("dycoke_open_streams")
        await answer_all(worker, [*responses, last])
    done = await processes.values(
        "dycoke_requests_total", model=MODEL, policy="dycoke", requested="fixed", outcome="done"
    )
    assert done == num_open
    rejections = await processes.values("dycoke_rejections_total", reason="too_many_streams")
    assert sum(rejections.values()) == 1.0
    assert set(await processes.values("process_start_time_seconds")) == {"0", "1"}


async def test_death_is_logged_shown_and_made_good_and_loses_no_connection(
    processes: Processes,
) -> None:
    first, second = processes.pid_of(0), processes.pid_of(1)
    for pid in (first, second):
        psutil.Process(pid).suspend()
    host, port = processes.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as waiting:
        waiting.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        psutil.Process(first).kill()
        psutil.Process(second).resume()
        reply = await asyncio.to_thread(waiting.recv, 1000)
    assert reply.startswith(b"HTTP/1.1 200")
    await processes.wait_for("dycoke_api_process_deaths_total", p0=1.0, p1=0.0)
    await processes.wait_for("dycoke_api_process_up", p0=1.0, p1=1.0)
    assert processes.pid_of(0) != first and processes.pid_of(1) == second
    (died,) = [e for e in processes.entries if e["message"] == "child died; restarting it"]
    assert (died["child"], died["exit_code"]) == ("api-0", -signal.SIGKILL)


async def test_stuck_process_shows_and_the_other_answers(processes: Processes) -> None:
    psutil.Process(processes.pid_of(1)).suspend()
    await processes.wait_for("dycoke_api_process_up", p0=1.0, p1=0.0)
    assert (await processes.get("/livez")).status_code == 200
    psutil.Process(processes.pid_of(1)).resume()
    await processes.wait_for("dycoke_api_process_up", p0=1.0, p1=1.0)


async def test_process_that_drains_alone_leaves_new_requests_to_the_other(
    processes: Processes, worker: ScriptedWorker
) -> None:
    video_id = await processes.upload()
    async with streams_in_both(processes, video_id) as responses:
        os.kill(processes.pid_of(0), signal.SIGTERM)

        async def has_heard() -> bool:
            return any(e["message"] == "SIGTERM: shutting down" for e in processes.entries)

        await wait_until(has_heard)
        for _ in range(10):
            assert (await processes.get("/readyz")).status_code == 200
        await answer_all(worker, responses)
    await processes.wait_for("dycoke_api_process_deaths_total", p0=1.0, p1=0.0)


async def test_sigterm_drains_all_processes_and_no_answer_is_cut(
    processes: Processes, worker: ScriptedWorker
) -> None:
    video_id = await processes.upload()
    async with streams_in_both(processes, video_id) as responses:
        processes.process.send_signal(signal.SIGTERM)

        async def is_draining() -> bool:
            return (await processes.get("/readyz")).status_code == 503

        await wait_until(is_draining)
        refused = await processes.post(video_id)
        assert (refused.status_code, refused.json()["code"]) == (503, "shutting_down")
        await answer_all(worker, responses)
    assert await processes.wait_for_end() == 0
    assert not [e for e in processes.entries if e["message"] == "child died; restarting it"]
    with pytest.raises(httpx.ConnectError):
        await processes.get("/livez")


async def test_second_signal_ends_answers_but_no_job(
    processes: Processes, worker: ScriptedWorker
) -> None:
    video_id = await processes.upload()
    async with streams_in_both(processes, video_id) as responses:
        deliveries = [await worker.take() for _ in responses]
        processes.process.send_signal(signal.SIGTERM)

        async def is_draining() -> bool:
            return (await processes.get("/readyz")).status_code == 503

        await wait_until(is_draining)
        processes.process.send_signal(signal.SIGTERM)
        for response in responses:
            rest = await EventReader(response).rest()
            assert "done" not in [event.name for event in rest]
    assert await processes.wait_for_end() == 0
    assert not [e for e in processes.entries if e["message"] == "child did not stop in time"]
    for delivery in deliveries:
        assert await worker.say(delivery, 0), "the job continues"


@pytest.mark.parametrize("num_processes", ["1", "2"])
async def test_port_in_use_is_told_in_one_line(
    redis_server: RedisServer, tmp_path: Path, num_processes: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        env = os.environ | {
            "DYCOKE_REDIS_URL": redis_server.url,
            "DYCOKE_DATA_DIR": str(tmp_path),
            "DYCOKE_PORT": str(taken.getsockname()[1]),
            "DYCOKE_API_PROCESSES": num_processes,
            "DYCOKE_LOG_LEVEL": "WARNING",
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "app", "api"), env=env, stderr=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(PATIENCE_S):
            _, errors = await process.communicate()
    assert process.returncode == 2
    assert b"in use" in errors and errors.count(b"\n") == 1, errors.decode()
