"""The service's HTTP interface for load generators: one connection per call, and the time at which
every token arrived.

Blocking, with the standard library's HTTP client: cheap, and cooperative under gevent. It knows
nothing of locust.
"""

import http.client
import json
import struct
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

CHAT = "/v1/video/chat"
FINAL_EVENTS = ("done", "error")

Fields = Mapping[str, Any]


def with_content_of_its_own(clip: bytes, tag: bytes) -> bytes:
    """The same MP4 with an empty box appended: the same frames, but in no cache."""
    return clip + struct.pack(">I4s", 8 + len(tag), b"free") + tag


class ServiceError(Exception):
    """The service refused. `code` is the problem's; `retry_after_s` is None if it gave none."""

    def __init__(self, status: int, code: str, retry_after_s: float | None) -> None:
        super().__init__(f"{status} {code}")
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    data: dict[str, Any]
    id: str | None
    at_s: float  # on the clock of `time.perf_counter`


@dataclass(slots=True)
class Answer:
    """What one client saw of one job. Seconds count from when it started to send its request."""

    began_at_s: float
    job_id: str = ""
    video_id: str = ""
    last_event_id: str | None = None
    token_ids: list[int] = field(default_factory=list)
    first_token_at_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    ended_at_s: float | None = None
    receipt: dict[str, Any] | None = None
    error: str | None = None
    _last_token_at_s: float | None = None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_at_s is None else self.first_token_at_s - self.began_at_s

    @property
    def total_s(self) -> float | None:
        return None if self.ended_at_s is None else self.ended_at_s - self.began_at_s

    def see(self, event: Event) -> None:
        self.last_event_id = event.id or self.last_event_id
        if event.name == "job":
            self.job_id, self.video_id = event.data["job_id"], event.data["video_id"]
        elif event.name == "token":
            self._see_token(event)
        elif event.name in FINAL_EVENTS:
            self.ended_at_s = event.at_s
            self.receipt = event.data if event.name == "done" else None
            self.error = event.data["code"] if event.name == "error" else None

    def _see_token(self, event: Event) -> None:
        self.token_ids += event.data["token_ids"]
        if self.first_token_at_s is None:
            self.first_token_at_s = event.at_s
        if self._last_token_at_s is not None:
            self.gaps_s.append(event.at_s - self._last_token_at_s)
        self._last_token_at_s = event.at_s


class Stream:
    """An answer's events as they arrive. Leaving the block closes the connection, read or not."""

    def __init__(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse
    ) -> None:
        self._connection = connection
        self._response = response

    def __iter__(self) -> Iterator[Event]:
        name, data, event_id = "", "", None
        while line := self._response.readline():
            word, _, value = line.decode().rstrip("\n").partition(": ")
            if not word and name:
                yield Event(name, json.loads(data), event_id, time.perf_counter())
                name, data, event_id = "", "", None
            elif word == "event":
                name = value
            elif word == "data":
                data = value
            elif word == "id":
                event_id = value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._response.close()
        self._connection.close()


class Service:
    """Args:
    api_key: where the service asks for one.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 120.0) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._headers = {"Connection": "close"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_s = timeout_s

    def upload(self, clip: bytes) -> str:
        body, kind = _form({}, clip)
        return str(self._json("POST", "/v1/videos", body, {"Content-Type": kind})["video_id"])

    def ask(self, fields: Fields, clip: bytes | None = None) -> Stream:
        """Posts a question, with its video or with the id of one.

        Raises:
            ServiceError: refused.
        """
        return self._stream("POST", CHAT, *_chat_body(fields, clip))

    def ask_whole(self, fields: Fields) -> dict[str, Any]:
        """Posts a question and waits for the whole answer's receipt."""
        body, headers = _chat_body({**fields, "stream": False}, None)
        return self._json("POST", CHAT, body, headers)

    def resume(self, job_id: str, last_event_id: str) -> Stream:
        headers = {"Last-Event-ID": last_event_id}
        return self._stream("GET", f"/v1/jobs/{job_id}/events", b"", headers)

    def job(self, job_id: str) -> dict[str, Any]:
        return self._json("GET", f"/v1/jobs/{job_id}")

    def cancel(self, job_id: str) -> dict[str, Any]:
        return self._json("DELETE", f"/v1/jobs/{job_id}")

    def text(self, path: str) -> str:
        connection, response = self._send("GET", path, b"", {})
        try:
            return response.read().decode()
        finally:
            connection.close()

    def _json(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}
    ) -> dict[str, Any]:
        connection, response = self._send(method, path, body, headers)
        try:
            reply: dict[str, Any] = json.loads(response.read())
            return reply
        finally:
            connection.close()

    def _stream(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Stream:
        return Stream(*self._send(method, path, body, headers))

    def _send(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request(method, path, body or None, {**headers, **self._headers})
            response = connection.getresponse()
            if response.status >= 400:
                raise _refusal(response)
        except BaseException:
            connection.close()
            raise
        return connection, response


def _refusal(response: http.client.HTTPResponse) -> ServiceError:
    try:
        code = str(json.loads(response.read())["code"])
    except (ValueError, KeyError):
        code = response.reason
    retry_after = response.headers.get("Retry-After")
    return ServiceError(response.status, code, float(retry_after) if retry_after else None)


def _chat_body(fields: Fields, clip: bytes | None) -> tuple[bytes, dict[str, str]]:
    if clip is None:
        return json.dumps(dict(fields)).encode(), {"Content-Type": "application/json"}
    body, kind = _form(fields, clip)
    return body, {"Content-Type": kind}


def _form(fields: Fields, clip: bytes) -> tuple[bytes, str]:
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{_text(value)}\r\n'
        for name, value in fields.items()
    ]
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="video"; filename="clip.mp4"\r\n'
        "Content-Type: video/mp4\r\n\r\n"
    )
    body = "".join(parts).encode() + head.encode() + clip + f"\r\n--{boundary}--\r\n".encode()
    return body, f"multipart/form-data; boundary={boundary}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
