"""The open loop and the calibration against a server with scripted answers."""

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from loadtest.auto.calibration import calibrate, warm_up
from loadtest.auto.profile import Arrival
from loadtest.auto.run import Choice, OpenLoop, label
from tests.loadtest.auto.canned import QUESTION, VIDEOS

AUTO = {"level": 2, "reason": "objective", "predicted_ttft_s": 0.75}


class Server(ThreadingHTTPServer):
    """Answers video n as `scripts[n]` says: a status of refusal, "cut", "error", or a text."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scripts: dict[int, int | str] = {}
        self.clips: list[bytes] = []
        self.fields: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        found = re.search(rb"scene \d.*?free(.*?/(-?\d+))\r\n", body, flags=re.DOTALL)
        assert found is not None
        server.clips.append(found[1])
        server.fields.append(body.decode(errors="replace"))
        script = server.scripts.get(int(found[2]), QUESTION.answer)
        if isinstance(script, int):
            self._send(script, json.dumps({"code": "queue_full"}).encode())
        else:
            self._send(200, b"".join(events(script)))

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def events(script: str) -> Iterator[bytes]:
    def event(name: str, data: dict[str, Any]) -> bytes:
        return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()

    yield event("job", {"job_id": "j", "video_id": "v"})
    yield event("token", {"token_ids": [7], "index": 0})
    if script == "error":
        yield event("error", {"code": "out_of_memory"})
    elif script != "cut":
        yield event(
            "done",
            {
                "text": script,
                "compression": {"policy": "dycoke", "parameters": {"k": 0.7}, "auto": AUTO},
                "cache": {"prefix": "hit"},
                "timings_s": {"ttft": 0.5},
            },
        )


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def arrivals(number: int) -> list[Arrival]:
    return [Arrival(0.01 * n, 0, video=n, scene=n % 4, question=QUESTION) for n in range(number)]


def test_every_arrival_has_its_outcome_in_its_place(server: Server) -> None:
    server.scripts = {1: 429, 2: 400, 3: "cut", 4: "error", 5: "It is blue."}
    result = OpenLoop(server.url, VIDEOS, "auto", tag="run").run(arrivals(7))
    good, refused, bad, cut, error, wrong, last = result.outcomes
    assert [outcome.arrival for outcome in result.outcomes] == arrivals(7)
    assert good.is_answered and good.is_right and last.is_right
    assert good.compression == "dycoke k=0.7" and good.has_prefix
    assert good.choice == Choice(2, "objective", 0.75, 0.5)
    assert good.ttft_s is not None and good.total_s is not None
    assert 0 < good.ttft_s <= good.total_s
    assert refused.refused == "queue_full" and refused.ttft_s is None and not refused.failure
    assert bad.failure is not None and "400" in bad.failure
    assert cut.failure == "the stream ended without a last event" and not cut.is_answered
    assert error.failure == "out_of_memory"
    assert wrong.is_answered and wrong.is_right is False


def test_questions_of_one_video_send_the_same_bytes_and_runs_differ(server: Server) -> None:
    one = Arrival(0.0, 0, video=5, scene=1, question=QUESTION)
    for tag in ("a", "a", "b"):
        OpenLoop(server.url, VIDEOS, "full", tag=tag).ask(one, time.perf_counter())
    first, again, other = server.clips
    assert first == again != other


def test_compression_and_question_reach_the_service(server: Server) -> None:
    compression = {"policy": "auto", "objective_s": 0.5}
    loop = OpenLoop(server.url, VIDEOS, compression, num_frames=16, judges=False)
    outcome = loop.ask(arrivals(1)[0], time.perf_counter())
    assert outcome.is_answered and outcome.is_right is None
    (fields,) = server.fields
    for expected in (json.dumps(compression), QUESTION.text, "\r\n16\r\n"):
        assert expected in fields


def test_times_count_from_when_a_question_was_due_and_lateness_is_noticed(server: Server) -> None:
    loop = OpenLoop(server.url, VIDEOS, "full")
    due_long_ago = Arrival(-50.0, 0, video=0, scene=0, question=QUESTION)
    result = loop.run([due_long_ago])
    assert result.outcomes[0].ttft_s is not None and result.outcomes[0].ttft_s > 49
    assert result.max_stall_s > 49


def test_service_that_is_not_there_is_a_failure_of_each(server: Server) -> None:
    server.shutdown()
    server.server_close()
    result = OpenLoop(server.url, VIDEOS, "full").run(arrivals(2))
    assert all("refused" in (outcome.failure or "") for outcome in result.outcomes)


def test_calibration_asks_about_new_videos_and_then_all_at_once(server: Server) -> None:
    loop = OpenLoop(server.url, VIDEOS, "full")
    calibration = calibrate(loop, VIDEOS, num_questions=12, objective_factor=3.0)
    assert calibration.capacity_per_s > 0 and calibration.idle_ttft_s is not None
    assert calibration.objective_s == pytest.approx(3 * calibration.idle_ttft_s, abs=0.01)
    assert len(server.clips) > 12


def test_warm_up_does_not_go_on_where_nobody_answers(server: Server) -> None:
    class Refusing(dict[int, int | str]):
        def get(self, *_: Any) -> int:
            return 503

    server.scripts = Refusing()
    with pytest.raises(RuntimeError, match="queue_full"):
        warm_up(OpenLoop(server.url, VIDEOS, "full"), VIDEOS)


def test_compressions_are_told_apart_by_k() -> None:
    assert label("full", {}) == "full"
    assert label("dycoke", {"k": 0.9, "l": 3}) == "dycoke k=0.9"
