"""
title: DyCoke Serve
description: Asks DyCoke Serve about a video that was uploaded to the conversation.
version: 0.1.0
license: Apache-2.0
requirements: httpx
"""

# A pipe function of Open WebUI, which forwards no uploaded video to a model by itself. Paste this
# file into Admin Panel > Functions, enable it, and set its valves. Its models are those that the
# service serves; a conversation has a video or none.
#
# The newest video of a conversation is uploaded once and goes before the first question, so that
# follow-up questions find its frames and its prefix in the caches. Stopping an answer cancels it.

import asyncio
import json
import mimetypes
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, Field

Emitter = Callable[[dict[str, Any]], Awaitable[None]]
Messages = list[dict[str, Any]]

# What the service honours of what Open WebUI sends.
FORWARDED = ("temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "stop")
MAX_REMEMBERED = 1024  # uploads


class Pipe:
    class Valves(BaseModel):
        BASE_URL: str = Field("http://127.0.0.1:8000/v1", description="Of DyCoke Serve, with /v1")
        API_KEY: str = Field("", description="Empty where the service asks for none")
        COMPRESSION: str = Field(
            "", description="A policy or a JSON object; empty: the service's default"
        )
        FPS: float = Field(0, ge=0, description="Frames per second; 0: 32 frames of any video")
        EXPIRES_AFTER_S: int = Field(
            7 * 86400, ge=0, description="After which the service deletes a video; 0: never"
        )
        SILENCE_S: float = Field(60, gt=0, description="After which an answer is given up")
        UPLOADS_DIR: str = Field(
            "/app/backend/data/uploads", description="Open WebUI's; no other file is sent"
        )

    def __init__(self) -> None:
        self.valves = self.Valves()
        self._uploaded: OrderedDict[str, str] = OrderedDict()  # our ids by Open WebUI's

    async def pipes(self) -> list[dict[str, str]]:
        """The models to choose from."""
        try:
            async with self._client() as client:
                response = await client.get("models")
                await _check(response)
        except FAILURES as error:
            return [{"id": "error", "name": f"DyCoke Serve: {_words(error)}"}]
        return [{"id": model["id"], "name": model["id"]} for model in response.json()["data"]]

    async def pipe(
        self,
        body: dict[str, Any],
        __files__: list[dict[str, Any]] | None = None,
        __metadata__: dict[str, Any] | None = None,
        __task__: str | None = None,
        __event_emitter__: Emitter | None = None,
    ) -> AsyncGenerator[str, None] | str:
        """An answer, as lines of server-sent events or, where `stream` is not set, as text.

        Args:
            __task__: one of Open WebUI's own, such as a title; it needs no video.
        """
        status = _Status(__event_emitter__)
        messages = _messages(body["messages"], None if __task__ else __metadata__)
        lines = self._answer(body, messages, [] if __task__ else _videos(__files__), status)
        if body.get("stream"):
            return _told(lines, status)
        try:
            return "".join([_text(line) async for line in lines])
        except FAILURES as error:
            return f"Error: {_words(error)}"

    async def _answer(
        self, body: dict[str, Any], messages: Messages, videos: Messages, status: "_Status"
    ) -> AsyncGenerator[str, None]:
        """The lines of a stream. Raises: FAILURES."""
        request = self._request(body, messages)
        async with self._client() as client:
            if videos:
                await self._attach(client, messages, videos, status)
            try:
                async with aclosing(_lines(client, request, status)) as lines:
                    async for line in lines:
                        yield line
                return
            except ServiceError as error:
                if error.code != "video_not_found" or not videos:
                    raise
            self._uploaded.pop(videos[-1]["id"], None)  # the service has it no more
            await self._attach(client, messages, videos, status)
            async with aclosing(_lines(client, request, status)) as lines:
                async for line in lines:
                    yield line

    def _request(self, body: dict[str, Any], messages: Messages) -> dict[str, Any]:
        request = {name: body[name] for name in FORWARDED if body.get(name) is not None}
        request |= {
            "model": body["model"].partition(".")[2],  # "ID-OF-THIS-PIPE.MODEL"
            "messages": messages,
            "stream": True,  # in any case: heartbeats tell that it is alive
            "stream_options": {"include_usage": True},
        }
        said = self.valves.COMPRESSION.strip()
        if said:
            request["compression"] = json.loads(said) if said.startswith("{") else said
        return request

    async def _attach(
        self, client: httpx.AsyncClient, messages: Messages, videos: Messages, status: "_Status"
    ) -> None:
        """Puts the newest video before the first question."""
        if len(videos) > 1:
            await status.say(f"{len(videos)} videos; the newest is asked about")
        video_id = await self._upload(client, videos[-1], status)
        options = {"fps": self.valves.FPS} if self.valves.FPS else {}
        part = {"type": "video_url", "video_url": {"url": video_id, **options}}
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is not None:
            others = [p for p in _parts(first["content"]) if p.get("type") != "video_url"]
            first["content"] = [part, *others]

    async def _upload(
        self, client: httpx.AsyncClient, video: dict[str, Any], status: "_Status"
    ) -> str:
        if video["id"] in self._uploaded:
            self._uploaded.move_to_end(video["id"])
            return self._uploaded[video["id"]]
        path = await asyncio.to_thread(_local_path, video, self.valves.UPLOADS_DIR)
        await status.say("uploading the video")
        fields = {"purpose": "user_data"}
        if self.valves.EXPIRES_AFTER_S:
            fields["expires_after"] = str(self.valves.EXPIRES_AFTER_S)
        with path.open("rb") as file:
            response = await client.post("files", data=fields, files={"file": ("video", file)})
        await _check(response)
        self._uploaded[video["id"]] = video_id = str(response.json()["id"])
        if len(self._uploaded) > MAX_REMEMBERED:
            self._uploaded.popitem(last=False)
        return video_id

    def _client(self) -> httpx.AsyncClient:
        key = self.valves.API_KEY
        return httpx.AsyncClient(
            base_url=self.valves.BASE_URL,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(self.valves.SILENCE_S, connect=10),
        )


class ServiceError(Exception):
    """The service said no."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


FAILURES = (httpx.HTTPError, OSError, ServiceError, ValueError)


class _Status:
    """The status line above an answer."""

    def __init__(self, emit: Emitter | None) -> None:
        self._emit = emit

    async def say(self, text: str, *, is_done: bool = False) -> None:
        if self._emit is not None:
            data = {"description": f"DyCoke: {text}", "done": is_done}
            await self._emit({"type": "status", "data": data})


async def _told(lines: AsyncGenerator[str, None], status: _Status) -> AsyncGenerator[str, None]:
    """The lines, and where they fail one that says so."""
    try:
        async with aclosing(lines):
            async for line in lines:
                yield line
    except FAILURES as error:
        await status.say("failed", is_done=True)
        yield f"data: {json.dumps({'error': {'message': _words(error)}})}"


async def _lines(
    client: httpx.AsyncClient, request: dict[str, Any], status: _Status
) -> AsyncGenerator[str, None]:
    async with client.stream("POST", "chat/completions", json=request) as response:
        await _check(response)
        async for line in response.aiter_lines():
            if not line:
                continue
            yield line
            if '"dycoke":' in line:
                await status.say(_summary(_data(line)["dycoke"]), is_done=True)


async def _check(response: httpx.Response) -> None:
    """Raises: ServiceError."""
    if response.is_success:
        return
    await response.aread()
    try:
        error = response.json()["error"]
        raise ServiceError(str(error["message"]), str(error["code"]))
    except (ValueError, KeyError, TypeError):
        raise ServiceError(f"HTTP status {response.status_code}", "unknown") from None


def _data(line: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(line.removeprefix("data: "))
    return data


def _text(line: str) -> str:
    """What one line of a stream adds to the answer. Raises: ServiceError."""
    if line == "data: [DONE]":
        return ""
    data = _data(line)
    if "error" in data:
        raise ServiceError(data["error"]["message"], data["error"]["code"])
    return "".join(choice["delta"].get("content") or "" for choice in data["choices"])


def _messages(messages: Messages, metadata: dict[str, Any] | None) -> Messages:
    """The conversation without answers that were stopped before they began, and with the last
    question as its user wrote it: where there are files, Open WebUI wraps it into a template for
    citations.
    """
    copied = [
        {"role": message["role"], "content": message["content"]}
        for message in messages
        if message["content"] or message["role"] == "user"
    ]
    prompt = (metadata or {}).get("user_prompt")
    if prompt and copied and copied[-1]["role"] == "user":
        others = [p for p in _parts(copied[-1]["content"]) if p.get("type") != "text"]
        copied[-1]["content"] = [{"type": "text", "text": prompt}, *others]
    return copied


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _videos(files: list[dict[str, Any]] | None) -> Messages:
    """Those of a conversation's files that are videos, in the order of their upload."""
    known = [entry["file"] for entry in files or [] if isinstance(entry.get("file"), dict)]
    return [file for file in known if _type(file).startswith("video/")]


def _type(file: dict[str, Any]) -> str:
    said = (file.get("meta") or {}).get("content_type")
    return str(said or mimetypes.guess_type(file.get("filename") or "")[0] or "")


def _local_path(file: dict[str, Any], folder: str) -> Path:
    """Where an upload can be read. A path from a browser is not trusted: the file is Open WebUI's
    own, and is named after its id, which is known only to those who may see it.

    Raises: FileNotFoundError.
    """
    path = str(file["path"])
    if "://" in path:  # a bucket's
        from open_webui.storage.provider import Storage

        path = Storage.get_file(path)
    found = Path(path).resolve()
    is_own = found.is_relative_to(Path(folder).resolve())
    if not is_own or not found.name.startswith(f"{file['id']}_") or not found.is_file():
        raise FileNotFoundError
    return found


def _summary(receipt: dict[str, Any]) -> str:
    ratio = receipt["compression"]["retained_ratio"]
    kept = f"{ratio['prefill']:.0%} of the visual tokens kept, " if ratio else ""
    return f"{kept}first token after {receipt['timings_s']['ttft']:.1f} s"


def _words(error: Exception) -> str:
    if isinstance(error, httpx.HTTPError):
        return "the service does not answer"
    return "the uploaded video cannot be read" if isinstance(error, OSError) else str(error)
