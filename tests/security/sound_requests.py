"""What JSON Schema cannot say: ids that the service knows, bytes that are a video, fields within
this server's limits. With them each operation of the OpenAPI document has a request that succeeds,
and generated requests get beyond the first look-up.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.security.service import CLIP, ask, upload

JSON, FORM = "application/json", "multipart/form-data"
REPLACED = frozenset({"question", "messages", "video_id", "video", "file"})
# By field what is sound by the document, and may be more than this server takes.
LIMITED: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(
        (
            *("num_frames", "max_pixels", "max_tokens", "max_completion_tokens"),
            *("fps", "start_s", "end_s", "deadline_s"),
        ),
        (int, float),
    ),
    **dict.fromkeys(("stream_options", "media_io_kwargs", "mm_processor_kwargs"), dict),
    "expires_after": (int, dict),
    "model": str,
}


@dataclass(frozen=True)
class SoundRequest:
    """As `schemathesis` wants its parts."""

    path_parameters: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    media_type: str | None = None


class Known:
    """What a key has: a video and a job about it, and a second video that may be deleted."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        # Bytes that no upload of these tests has, so that none of them sets when it expires.
        self._video_id = upload(client, CLIP.read_bytes() + b"\0" * 32)["video_id"]
        self._job_id = ask(client, self._video_id, kept_mask=True)["job_id"]
        self._ids = {"video_id": self._video_id, "file_id": self._video_id, "job_id": self._job_id}

    def requests(self, label: str, path: str, required: list[str]) -> Iterator[SoundRequest]:
        """Requests that succeed, in each way that the document has for the operation.

        Args:
            label: method and path.
            required: parameters of the query.
        """
        values = {**self._ids, "model": "tiny", "index": "0", "token": "0"}
        if label in ("DELETE /v1/videos/{video_id}", "DELETE /v1/files/{file_id}"):
            values |= self.deletable()
        parameters = {name: value for name, value in values.items() if f"{{{name}}}" in path}
        query = {name: values[name] for name in required}
        for body, media_type in self._bodies(label):
            yield SoundRequest(parameters, query, {}, body, media_type)
        for headers in self._headers(label):
            yield SoundRequest(parameters, query, headers)

    def deletable(self) -> dict[str, str]:
        """The second video, uploaded and stored again."""
        video_id = upload(self._client)["video_id"]
        return {"video_id": video_id, "file_id": video_id}

    def ids(self, *, is_deleted: bool) -> dict[str, str]:
        """Of what is known, by the names of parameters."""
        return self._ids | (self.deletable() if is_deleted else {})

    def body(self, label: str, media_type: str, generated: Mapping[str, Any]) -> dict[str, Any]:
        """A generated body about a known video, with what is wrong in its other fields."""
        sound = next(body for body, kind in self._bodies(label) if kind == media_type)
        left = {
            name: value
            for name, value in generated.items()
            if name not in REPLACED
            and not _is_limited(name, value)
            and not (value is None and media_type == FORM)  # which has no null but the word
        }
        return {**(sound or {}), **left}

    def _bodies(self, label: str) -> list[tuple[dict[str, Any] | None, str | None]]:
        clip = CLIP.read_bytes()
        question = self._question("What?")
        part = {"type": "video_url", "video_url": {"url": self._video_id}}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
        completion = {"messages": messages, "max_tokens": 2}
        usage = {"include_usage": True, "continuous_usage_stats": True}
        return {
            "POST /v1/video/chat": [
                (question, JSON),
                ({**question, "stream": False, "kept_mask": True}, JSON),
                ({"question": "What?", "max_tokens": 2, "video": clip}, FORM),
            ],
            "POST /v1/chat/completions": [
                (completion, JSON),
                ({**completion, "stream": True}, JSON),
                ({**completion, "stream": True, "stream_options": usage}, JSON),
            ],
            "POST /v1/videos": [
                ({"video": clip}, FORM),
                ({"video": clip, "expires_after": 9}, FORM),
            ],
            "POST /v1/files": [({"file": clip, "purpose": "vision"}, FORM)],
        }.get(label, [(None, None)])

    def _headers(self, label: str) -> list[dict[str, str]]:
        """Beside none, which are those of the bodies."""
        if label.endswith("/content"):
            return [{"Range": "bytes=0-9"}, {"Range": "bytes=0-9,20-29"}]
        if label.endswith("/events"):
            events = self._client.get(f"/v1/jobs/{self._job_id}/events").text
            *_, last = (line for line in events.splitlines() if line.startswith("id: "))
            return [{"Last-Event-ID": last.removeprefix("id: ")}]
        return []

    def _question(self, text: str) -> dict[str, Any]:
        return {"question": text, "video_id": self._video_id, "max_tokens": 4}


def _is_limited(name: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, LIMITED.get(name, ())):
        return False
    return not isinstance(value, int | float) or value > 0
