"""What one client sees of one answer, and how it sends a question."""

import email
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from loadtest.client import Answer, Event, Service, ServiceError, with_content_of_its_own


def test_answer_measures_from_the_request_to_each_token() -> None:
    answer = Answer(began_at_s=10.0)
    said: list[tuple[str, float, dict[str, Any]]] = [
        ("job", 10.1, {"job_id": "j", "video_id": "v"}),
        ("status", 10.2, {}),
        ("token", 10.5, {"token_ids": [1, 2]}),
        ("token", 10.7, {"token_ids": [3]}),
        ("done", 11.0, {"usage": {}}),
    ]
    for number, (name, at_s, data) in enumerate(said):
        answer.see(Event(name, data, f"{number}-0" if name != "status" else None, at_s))
    assert (answer.job_id, answer.video_id, answer.token_ids) == ("j", "v", [1, 2, 3])
    assert answer.ttft_s == pytest.approx(0.5)
    assert answer.gaps_s == pytest.approx([0.2])
    assert answer.total_s == pytest.approx(1.0)
    assert answer.last_event_id == "4-0" and answer.receipt == {"usage": {}}


class Handler(BaseHTTPRequestHandler):
    """Answers by path, and notes what it was sent."""

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        noted(self).append((self.path, dict(self.headers), self.rfile.read(length)))
        if self.path == "/v1/videos":
            self._send(200, b'{"video_id": "vid_1"}')
        else:
            self._send(200, STREAM, content_type="text/event-stream")

    def do_GET(self) -> None:
        noted(self).append((self.path, dict(self.headers), b""))
        problem = b'{"code": "queue_full"}'
        replies = {
            "/v1/jobs/full": (429, problem, {"Retry-After": "3"}),
            "/v1/jobs/broken": (502, b"<html>", {}),
            "/metrics": (200, b"dycoke_up 1\n", {}),
        }
        status, body, headers = replies.get(self.path, (200, b'{"state": "done"}', {}))
        self._send(status, body, **headers)

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


STREAM = (
    b'event: job\nid: 0-1\ndata: {"job_id": "j", "video_id": "v"}\n\n'
    b": heartbeat\n\n"
    b'event: status\ndata: {"stage": "queued"}\n\n'
    b'event: done\nid: 9-0\ndata: {"text": "a: b"}\n\n'
)
Noted = list[tuple[str, dict[str, str], bytes]]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.noted: Noted = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def noted(handler: Handler) -> Noted:
    assert isinstance(handler.server, Server)
    return handler.server.noted


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_events_are_read_as_they_come_and_silence_is_none(server: Server) -> None:
    with Service(server.url).ask({"question": "What?"}) as stream:
        events = list(stream)
    assert [(event.name, event.id) for event in events] == [
        ("job", "0-1"),
        ("status", None),
        ("done", "9-0"),
    ]
    assert events[-1].data == {"text": "a: b"}
    ((path, headers, body),) = server.noted
    assert path == "/v1/video/chat" and headers["Content-Type"] == "application/json"
    assert json.loads(body) == {"question": "What?"}


def test_a_video_is_sent_in_a_form_with_its_fields_as_text(server: Server) -> None:
    fields = {"question": "What?", "compression": {"policy": "full"}, "num_frames": 8}
    with Service(server.url, api_key="secret").ask(fields, b"\x00clip\r\n--") as stream:
        list(stream)
    ((_, headers, body),) = server.noted
    assert headers["Authorization"] == "Bearer secret"
    form = email.message_from_bytes(
        f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + body
    )
    parts = {
        str(part.get_param("name", header="Content-Disposition")): part.get_payload(decode=True)
        for part in form.walk()
        if not part.is_multipart()
    }
    assert parts == {
        "question": b"What?",
        "compression": b'{"policy": "full"}',
        "num_frames": b"8",
        "video": b"\x00clip\r\n--",
    }


def test_a_refusal_says_its_code_and_when_to_try_again(server: Server) -> None:
    service = Service(server.url)
    with pytest.raises(ServiceError) as caught:
        service.job("full")
    refusal = caught.value
    assert (refusal.status, refusal.code, refusal.retry_after_s) == (429, "queue_full", 3.0)
    with pytest.raises(ServiceError) as caught:
        service.job("broken")
    assert (caught.value.code, caught.value.retry_after_s) == ("Bad Gateway", None)


def test_a_reader_that_comes_back_says_what_it_has_seen(server: Server) -> None:
    service = Service(server.url)
    with service.resume("j", "3-0") as stream:
        list(stream)
    path, headers, _ = server.noted[0]
    assert path == "/v1/jobs/j/events" and headers["Last-Event-ID"] == "3-0"
    assert service.upload(b"clip") == "vid_1" and service.job("j") == {"state": "done"}
    assert service.text("/metrics") == "dycoke_up 1\n"


def test_a_clip_with_a_content_of_its_own_ends_with_an_empty_box() -> None:
    clip = with_content_of_its_own(b"clip", b"tag")
    assert clip == b"clip" + (11).to_bytes(4, "big") + b"free" + b"tag"
