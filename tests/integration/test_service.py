"""The whole service as users start it: `python -m app serve` with the bundled model."""

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from dycoke_core.tiny import CLIP
from tests.video_clips import make_audio, make_clip

PATIENCE_S = 120.0  # a worker takes six seconds of CPU time to start
LEASE_S = "5"  # short, and yet longer than a busy machine leaves a worker without its turn
NUM_TOKENS = 600  # of an answer in whose middle its worker is found and killed
BEGUN_S = 1.0  # after which a worker that has taken such a job is in the middle of its answer
METRICS_LINE = "serving metrics"
TAKEN_LINE = "job taken"
Event = tuple[str, dict[str, Any]]


@dataclass
class Service:
    client: httpx.Client
    process: "subprocess.Popen[bytes]"
    log: Path

    def ask(self, video_id: str, **fields: Any) -> Iterator[Event]:
        """Streams an answer as (event, data)."""
        body = {"video_id": video_id, "question": "What moves?", "max_tokens": 12, **fields}
        with self.client.stream("POST", "/v1/video/chat", json=body) as response:
            assert response.status_code == 200, response.read()
            yield from events_of(response)

    def upload(self, path: Path = CLIP) -> str:
        with path.open("rb") as file:
            response = self.client.post("/v1/videos", files={"video": file})
        assert response.status_code < 300, response.text
        video_id: str = response.json()["video_id"]
        return video_id

    def children(self, kind: str) -> list[psutil.Process]:
        """The supervisor's children by the word after `python -m app`."""
        processes = psutil.Process(self.process.pid).children()
        return [process for process in processes if kind in process.cmdline()]

    def worker_metrics(self) -> dict[int, str]:
        """By process id: the metrics pages of the workers that live."""
        ports = {
            line["pid"]: line["port"] for line in self._lines() if line["message"] == METRICS_LINE
        }
        alive = {worker.pid for worker in self.children("worker")}
        return {
            pid: httpx.get(f"http://127.0.0.1:{port}/metrics").text
            for pid, port in ports.items()
            if pid in alive
        }

    def wait_for_workers(self, number: int) -> None:
        """Until this many serve, also after others have been killed."""
        wait_until(lambda: len(self.worker_metrics()) == number)
        wait_until(lambda: self.client.get("/readyz").status_code == 200)

    def worker_of(self, job_id: str) -> int | None:
        """The process that took the job last."""
        taken = (line for line in self._lines() if line["message"] == TAKEN_LINE)
        pids: list[int] = [line["pid"] for line in taken if line["job_id"] == job_id]
        return pids[-1] if pids else None

    def _lines(self) -> Iterator[dict[str, Any]]:
        """What the processes have logged, but for Redis, which logs no JSON."""
        lines = self.log.read_text().splitlines()
        return (json.loads(line) for line in lines if line[:1] == "{")


def events_of(response: httpx.Response) -> Iterator[Event]:
    name = ""
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def receipt_of(events: Iterator[Event]) -> dict[str, Any]:
    *_, (name, data) = events
    assert name == "done", data
    return data


def tokens_of(events: list[Event]) -> list[int]:
    return [token for name, data in events if name == "token" for token in data["token_ids"]]


def num_running(page: str) -> float:
    found = re.search(r"^dycoke_requests_running\{[^}]*\} (\S+)$", page, re.MULTILINE)
    assert found is not None
    return float(found[1])


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@contextlib.contextmanager
def running_service(folder: Path, **settings: str) -> Iterator[Service]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {n: v for n, v in os.environ.items() if not n.startswith("DYCOKE_")}
    environment |= {
        "DYCOKE_PORT": str(port),
        "DYCOKE_DATA_DIR": str(folder / "data"),
        "DYCOKE_WORKER_METRICS_PORT": "0",
        "DYCOKE_WORKER_THREADS": "1",
        "DYCOKE_DTYPE": "float32",
        **settings,
    }
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S)
    service = Service(client, process, log)

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(is_ready)
        yield service
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0, log.read_text()
    finally:
        client.close()
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, random_checkpoint: Path) -> Iterator[Service]:
    settings = {"DYCOKE_MODEL": str(random_checkpoint), "DYCOKE_LEASE_S": LEASE_S}
    with running_service(tmp_path_factory.mktemp("service"), **settings) as service:
        yield service


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, random_checkpoint: Path) -> Iterator[Service]:
    """Two workers of one running job each."""
    settings = {
        "DYCOKE_MODEL": str(random_checkpoint),
        "DYCOKE_WORKERS": "2",
        "DYCOKE_MAX_RUNNING_JOBS": "1",
        "DYCOKE_LEASE_S": LEASE_S,
    }
    with running_service(tmp_path_factory.mktemp("pair"), **settings) as service:
        wait_until(lambda: service.client.get("/v1/models").json()["data"][0]["num_workers"] == 2)
        yield service


def test_both_policies_answer_and_account_for_themselves(service: Service) -> None:
    video_id = service.upload()
    full = receipt_of(service.ask(video_id, compression="full"))
    dycoke = receipt_of(service.ask(video_id, compression="dycoke"))
    assert full["compression"]["visual_tokens_prefill"] == 32 * 49
    assert dycoke["compression"]["visual_tokens_prefill"] == 728
    assert dycoke["compression"]["kept_per_frame"] == [49, 14, 14, 14] * 8
    assert dycoke["memory"]["kv_bytes"] < full["memory"]["kv_bytes"]
    assert full["memory"]["kv_bytes"] == full["memory"]["kv_bytes_full_tokens"]
    for receipt in (full, dycoke):
        assert receipt["usage"]["completion_tokens"] == 12
        assert len(receipt["frames"]["indices"]) == 32
        assert receipt["frames"]["reader"] == "decord"
        assert receipt["attempts"] == 1
        t = receipt["timings_s"]
        assert 0 < t["prefill"] <= t["ttft"] <= t["total"]
        assert receipt["memory"]["peak_device_bytes"] > 10**8


@pytest.mark.parametrize(
    ("compression", "num_prefill", "num_decode"),
    [
        ({"policy": "random_ttm", "seed": 4}, 728, 218),
        ("fewer_frames", 15 * 49, 220),
        ({"policy": "vidcom2", "retained_ratio": 0.4}, 627, 627),
        ("dycoke_one_shot", 728, 218),
        ({"policy": "random_kv", "seed": 4, "k": 0.5}, 968, 290),
        ("lowest_kv", 728, 218),
    ],
    ids=str,
)
def test_every_control_answers_twice_alike_and_accounts_for_itself(
    compression: str | dict[str, Any], num_prefill: int, num_decode: int, service: Service
) -> None:
    video_id = service.upload()
    first, second = (list(service.ask(video_id, compression=compression)) for _ in range(2))
    assert tokens_of(first) == tokens_of(second)
    receipt = receipt_of(iter(second))["compression"]
    named = {"policy": compression} if isinstance(compression, str) else compression
    assert named.items() <= {"policy": receipt["policy"], **receipt["parameters"]}.items()
    assert receipt["visual_tokens_prefill"] == num_prefill == sum(receipt["kept_per_frame"])
    assert receipt["visual_tokens_decode"] == num_decode
    if compression == "fewer_frames":
        assert sorted(set(receipt["kept_per_frame"])) == [0, 49]
    if compression == "dycoke_one_shot":
        assert receipt["refreshes"] == 0


def places(bitset: str) -> set[int]:
    data = base64.b64decode(bitset)
    return {8 * i + bit for i, byte in enumerate(data) for bit in range(8) if byte & 0x80 >> bit}


def test_kept_sets_can_be_seen_at_every_token(service: Service) -> None:
    receipt = receipt_of(service.ask(service.upload(), kept_mask=True))
    mask, compression = receipt["kept_mask"], receipt["compression"]
    assert (mask["units"], mask["tokens_per_unit"], mask["rows"], mask["columns"]) == (32, 49, 7, 7)
    stage_one = places(mask["stage1"])
    per_frame = [sum(place // 49 == frame for place in stage_one) for frame in range(32)]
    assert per_frame == compression["kept_per_frame"]
    path, sets = f"/v1/jobs/{receipt['job_id']}/kept", []
    for token in range(12):
        told = service.client.get(path, params={"token": token}).json()
        assert (told["stage1"], told["truncated"]) == (mask["stage1"], False)
        sets.append(told["stage2"])
    assert sets[0] is None and sets[-1] == mask["stage2"]
    for stage_two in sets[1:]:
        assert places(stage_two) <= stage_one
        assert len(places(stage_two)) == compression["visual_tokens_decode"]
    changes = sum(before != after for before, after in pairwise(sets[1:]))
    assert changes <= compression["refreshes"]
    assert receipt_of(service.ask(receipt["video_id"]))["kept_mask"] is None


def test_a_second_question_skips_reading_vision_and_prefix(service: Service) -> None:
    video_id = service.upload()
    receipt_of(service.ask(video_id, question="What is it?"))
    second = receipt_of(service.ask(video_id, question="What color is it?"))
    assert second["cache"] == {"frames": "hit", "features": "hit", "prefix": "hit"}
    assert second["timings_s"]["vision"] == 0


def test_the_same_request_gets_the_same_answer(service: Service) -> None:
    video_id = service.upload()
    fields = {"temperature": 0.8, "seed": 5}
    first, second, other = (
        list(service.ask(video_id, **{**fields, "seed": seed})) for seed in (5, 5, 6)
    )
    assert tokens_of(first) == tokens_of(second) != tokens_of(other)


def test_clips_and_turns_reach_the_model(service: Service) -> None:
    video_id = service.upload()
    whole = list(service.ask(video_id, num_frames=4))
    clip = list(service.ask(video_id, num_frames=4, start_s=2.0, end_s=3.0))
    assert tokens_of(whole) != tokens_of(clip)
    assert all(2 <= t <= 3 for t in clip[-1][1]["frames"]["timestamps_s"])
    turns = [
        {"role": "user", "content": "What moves?"},
        {"role": "assistant", "content": "A circle."},
        {"role": "user", "content": "Where to?"},
    ]
    chat = list(service.ask(video_id, num_frames=4, question=None, messages=turns))
    assert chat[-1][1]["usage"]["prompt_tokens"] > whole[-1][1]["usage"]["prompt_tokens"]


def test_metrics_of_api_and_worker_tell_of_the_same_jobs(service: Service) -> None:
    video_id = service.upload()
    receipt_of(service.ask(video_id))
    api = service.client.get("/metrics").text
    assert 'dycoke_retained_token_ratio_count{process="0",model="dycoke-tiny"' in api
    assert "dycoke_workers_alive" in api
    (worker,) = service.worker_metrics().values()
    assert re.search(r'dycoke_generation_tokens_total\{[^}]*policy="dycoke"', worker)
    assert re.search(r'dycoke_visual_tokens_total\{[^}]*stage="decode"', worker)
    names = {line.split("{")[0].split(" ")[0] for line in api.splitlines() if line[:1] != "#"}
    others = {line.split("{")[0].split(" ")[0] for line in worker.splitlines() if line[:1] != "#"}
    shared = {name for name in names & others if name.startswith("dycoke_")}
    assert not shared, "a figure has one exporter"


def test_workers_share_the_jobs(pair: Service) -> None:
    video_id = pair.upload()
    receipts: list[dict[str, Any]] = []

    def ask(number: int) -> None:
        receipts.append(receipt_of(pair.ask(video_id, question=f"{number}?", max_tokens=60)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(receipts) == 6
    pages = pair.worker_metrics()
    assert len(pages) == 2
    assert all("dycoke_generation_tokens_total{" in page for page in pages.values())


def kill_worker(service: Service, job_id: str, has_begun: threading.Event) -> None:
    """In the middle of the answer, even if its tokens are long on their way."""
    wait_until(lambda: service.worker_of(job_id) is not None)
    has_begun.wait(BEGUN_S)
    worker = service.worker_of(job_id)
    assert worker is not None
    os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("compression", ["full", {"policy": "dycoke", "threshold": 0.1}])
def test_an_answer_survives_the_death_of_its_worker(
    compression: str | dict[str, object], pair: Service
) -> None:
    """The other worker continues at the next token; the answer is that of an undisturbed run."""
    pair.wait_for_workers(2)
    video_id = pair.upload()
    fields: dict[str, Any] = {
        "compression": compression,
        "max_tokens": NUM_TOKENS,
        "temperature": 0.7,
        "seed": 3,
    }
    undisturbed = list(pair.ask(video_id, **fields))

    events: list[Event] = []
    has_begun = threading.Event()
    with ThreadPoolExecutor() as threads:
        for name, data in pair.ask(video_id, **fields):
            events.append((name, data))
            if name == "job":
                killing = threads.submit(kill_worker, pair, data["job_id"], has_begun)
            elif name == "token" and data["index"] >= 5:
                has_begun.set()
        killing.result()

    tokens = [data for name, data in events if name == "token"]
    ends = [data["index"] + len(data["token_ids"]) for data in tokens]
    assert [data["index"] for data in tokens] == [0, *ends[:-1]], "none lost, none repeated"
    assert ends[-1] == NUM_TOKENS
    assert tokens_of(events) == tokens_of(undisturbed)
    receipt, expected = events[-1][1], undisturbed[-1][1]
    assert receipt["text"] == expected["text"] == "".join(data["text"] for data in tokens)
    assert receipt["attempts"] == 2, "the busy worker was killed"
    for field in ("refreshes", "decode_steps", "kept_per_frame", "visual_tokens_decode"):
        assert receipt["compression"][field] == expected["compression"][field]
    assert receipt["memory"]["kv_bytes"] == expected["memory"]["kv_bytes"]
    pair.wait_for_workers(2)  # the supervisor starts another


def test_closing_the_connection_frees_the_engine(service: Service) -> None:
    video_id = service.upload()
    answer = service.ask(video_id, max_tokens=4000)
    for name, _ in answer:
        if name == "token":
            break
    answer.close()  # type: ignore[attr-defined]
    wait_until(lambda: all(num_running(page) == 0 for page in service.worker_metrics().values()))


HOSTILE: dict[str, tuple[Callable[[Path], object], set[int]]] = {
    "empty.mp4": (lambda path: path.write_bytes(b""), {415}),
    "random.mp4": (lambda path: path.write_bytes(os.urandom(50_000)), {415}),
    "playlist.mp4": (lambda path: path.write_text("#EXTM3U\nfile:///etc/passwd\n"), {415}),
    "sound.mp4": (lambda path: make_audio(path), {415}),
    "cut.mp4": (lambda path: path.write_bytes(CLIP.read_bytes()[:20_000]), {200, 422}),
    "one.mp4": (lambda path: make_clip(path, num_frames=1), {200}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_upload_gets_its_answer_and_harms_nobody(
    name: str, service: Service, tmp_path: Path
) -> None:
    make, statuses = HOSTILE[name]
    path = tmp_path / name
    make(path)
    with path.open("rb") as file:
        response = service.client.post(
            "/v1/video/chat",
            files={"video": (name, file, "video/mp4")},
            data={"question": "What?", "stream": "false", "max_tokens": "3", "num_frames": "4"},
        )
    assert response.status_code in statuses, response.text
    if response.status_code != 200:
        problem = response.json()
        assert response.headers["content-type"].startswith("application/problem+json")
        assert problem["code"] and str(tmp_path) not in response.text
    receipt_of(service.ask(service.upload(), max_tokens=2))
