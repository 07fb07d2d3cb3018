"""The pipe function for Open WebUI: what it asks the service, and what it gives back.

Open WebUI is not installed here. The stand-in follows its documentation of pipe functions and
reserved arguments: how a pipe is found and called, what a file looks like, what happens to what it
returns. Not tried: the real one's page, its storage in buckets, and which uploads it hands on
without processing them.
"""

import asyncio
import importlib.util
import inspect
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from app.store.keys import RedisKeys
from tests.docs.documents import ROOT
from tests.integration.api import (
    CLIP,
    MODEL,
    RunningApi,
    ScriptedWorker,
    running_api,
    until_state,
)
from tests.integration.conftest import RedisServer

FILE = ROOT / "deploy" / "open-webui" / "dycoke_pipe.py"


def load_pipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dycoke_pipe", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OpenWebUI:
    """What stands around a pipe: its valves, a folder of uploads, and a conversation."""

    def __init__(self, base_url: str, folder: Path, **valves: Any) -> None:
        self.pipe = load_pipe().Pipe()
        self.pipe.valves = self.pipe.Valves(
            BASE_URL=f"{base_url}/v1", UPLOADS_DIR=str(folder), **valves
        )
        self.folder = folder
        self.statuses: list[str] = []

    def upload(self, clip: bytes = CLIP, kind: str = "video/mp4") -> dict[str, Any]:
        file_id = str(uuid.uuid4())
        path = self.folder / f"{file_id}_holiday.mp4"
        path.write_bytes(clip)
        file = {
            "id": file_id,
            "filename": "holiday.mp4",
            "path": str(path),
            "data": {},
            "meta": {"name": "holiday.mp4", "content_type": kind, "size": len(clip)},
        }
        return {"type": "file", "file": file, "id": file_id, "name": "holiday.mp4"}

    async def call(self, *turns: str, stream: bool = True, **given: Any) -> Any:
        """A question, as the last of some turns. Only arguments that the pipe names reach it."""
        roles = ("user", "assistant")
        messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
        body = {
            "model": f"dycoke.{MODEL}",
            "messages": messages,
            "stream": stream,
            "temperature": 0.5,
            "features": {"web_search": False},
            "chat_id": "c",
        }
        arguments = {
            "__event_emitter__": self._emit,
            "__metadata__": {"user_prompt": turns[-1], "files": given.get("__files__", [])},
            "__user__": {"id": "u"},
            **given,
        }
        named = inspect.signature(self.pipe.pipe).parameters
        return await self.pipe.pipe(body, **{n: v for n, v in arguments.items() if n in named})

    async def ask(self, *turns: str, **given: Any) -> str:
        """The answer as the page shows it."""
        lines = await self.call(*turns, **given)
        assert isinstance(lines, AsyncGenerator)
        return "".join([shown(line) async for line in lines])

    async def _emit(self, event: dict[str, Any]) -> None:
        assert event["type"] == "status"
        self.statuses.append(event["data"]["description"])


def shown(line: str) -> str:
    """A line that begins with `data:` is passed on; any other would become text of the answer."""
    assert line.startswith("data: ") and "\n" not in line
    if line == "data: [DONE]":
        return ""
    data = json.loads(line.removeprefix("data: "))
    if "error" in data:
        return f"ERROR {data['error']['message']}"
    return "".join(choice["delta"].get("content", "") for choice in data["choices"])


@pytest.fixture
def webui(api: RunningApi, tmp_path: Path) -> OpenWebUI:
    folder = tmp_path / "uploads"
    folder.mkdir()
    return OpenWebUI(str(api.client.base_url), folder)


async def answered(worker: ScriptedWorker, asking: Any) -> tuple[str, Any]:
    """An answer and the request that the worker saw."""
    delivery, answer = await asyncio.gather(worker.answer(2), asking)
    return answer, delivery.request


async def test_it_offers_the_models_that_are_served(
    webui: OpenWebUI, worker: ScriptedWorker
) -> None:
    assert await webui.pipe.pipes() == [{"id": MODEL, "name": MODEL}]


async def test_a_video_is_uploaded_once_and_goes_before_the_first_question(
    webui: OpenWebUI, worker: ScriptedWorker, api: RunningApi
) -> None:
    files = [webui.upload()]
    answer, request = await answered(worker, webui.ask("What happens?", __files__=files))
    assert answer == "t0 t1 "
    (stored,) = (await api.client.get("/v1/files")).json()["data"]
    assert (request.video_id, request.video_turn) == (stored["id"], 0)
    assert stored["expires_at"] - stored["created_at"] == pytest.approx(7 * 86400, abs=60)
    assert request.temperature == 0.5 and request.warnings == []

    turns = ("What happens?", answer, "And then?")
    answer, request = await answered(worker, webui.ask(*turns, __files__=files))
    assert answer == "t0 t1 "
    assert (request.video_id, request.video_turn) == (stored["id"], 0)
    assert [turn.content for turn in request.messages] == [*turns]
    assert [s for s in webui.statuses if "uploading" in s] == ["DyCoke: uploading the video"]
    assert webui.statuses[-1] == "DyCoke: 50% of the visual tokens kept, first token after 0.1 s"


async def test_the_question_is_the_one_before_the_template_for_citations(
    webui: OpenWebUI, worker: ScriptedWorker
) -> None:
    asking = webui.ask("<context>...</context>", __metadata__={"user_prompt": "What happens?"})
    _, request = await answered(worker, asking)
    assert [turn.content for turn in request.messages] == ["What happens?"]


async def test_of_several_videos_the_newest_is_asked_about(
    webui: OpenWebUI, worker: ScriptedWorker, api: RunningApi
) -> None:
    newest = CLIP + b"2"
    files = [webui.upload(), webui.upload(b"text", "text/plain"), webui.upload(newest)]
    _, request = await answered(worker, webui.ask("What?", __files__=files))
    content = (await api.client.get(f"/v1/files/{request.video_id}/content")).content
    assert content == newest and webui.statuses[0] == "DyCoke: 2 videos; the newest is asked about"


async def test_a_video_that_the_service_has_no_more_is_uploaded_again(
    webui: OpenWebUI, worker: ScriptedWorker, api: RunningApi
) -> None:
    files = [webui.upload()]
    _, request = await answered(worker, webui.ask("What?", __files__=files))
    assert (await api.client.delete(f"/v1/files/{request.video_id}")).is_success
    answer, again = await answered(worker, webui.ask("What?", __files__=files))
    assert answer == "t0 t1 " and again.video_id == request.video_id


async def test_an_answer_in_one_piece_is_text(webui: OpenWebUI, worker: ScriptedWorker) -> None:
    asking = webui.call("What?", stream=False, __files__=[webui.upload()])
    answer, request = await answered(worker, asking)
    assert answer == "t0 t1 " and request.video_id


async def test_tasks_of_its_own_go_without_the_video(
    webui: OpenWebUI, worker: ScriptedWorker
) -> None:
    asking = webui.call(
        "Find a title.",
        stream=False,
        __files__=[webui.upload()],
        __task__="title_generation",
        __metadata__={"user_prompt": "What happens?"},
    )
    answer, request = await answered(worker, asking)
    assert answer == "t0 t1 " and request.video_id is None
    assert [turn.content for turn in request.messages] == ["Find a title."]


async def test_an_answer_that_was_stopped_at_once_is_left_out_of_the_history(
    webui: OpenWebUI, worker: ScriptedWorker
) -> None:
    _, request = await answered(worker, webui.ask("One?", "", "Two?"))
    assert [turn.content for turn in request.messages] == ["One?", "Two?"]


async def test_stopping_an_answer_cancels_its_job(
    webui: OpenWebUI, worker: ScriptedWorker, api: RunningApi
) -> None:
    lines = await webui.call("What?", __files__=[webui.upload()])
    first = asyncio.ensure_future(anext(lines))
    delivery = await worker.take()
    await worker.say(delivery, 0)
    assert shown(await first) == "t0 "
    await lines.aclose()
    await until_state(api, delivery.job_id, "cancelled")


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_what_the_service_refuses_is_told(
    is_streamed: bool, webui: OpenWebUI, worker: ScriptedWorker
) -> None:
    files = [webui.upload(b"GIF89a" + bytes(2000))]
    if is_streamed:
        answer = await webui.ask("What?", __files__=files)
        assert webui.statuses[-1] == "DyCoke: failed"
    else:
        answer = await webui.call("What?", stream=False, __files__=files)
    assert answer.lower().startswith("error") and "not in a container we take" in answer


async def test_a_service_that_is_not_there_is_told(tmp_path: Path) -> None:
    webui = OpenWebUI("http://127.0.0.1:9", tmp_path)
    assert await webui.ask("What?") == "ERROR the service does not answer"
    (model,) = await webui.pipe.pipes()
    assert model == {"id": "error", "name": "DyCoke Serve: the service does not answer"}


@pytest.fixture
async def guarded_api(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> AsyncIterator[RunningApi]:
    settings = {"api_keys": f"webui:{'k' * 40}"}
    async with running_api(redis_server.url, keys, tmp_path / "data", **settings) as api:
        yield api


async def test_the_key_and_the_compression_of_its_valves_are_used(
    guarded_api: RunningApi, worker: ScriptedWorker, tmp_path: Path
) -> None:
    base_url = str(guarded_api.client.base_url)
    stranger = OpenWebUI(base_url, tmp_path)
    assert (await stranger.ask("What?")).startswith("ERROR")
    webui = OpenWebUI(
        base_url,
        tmp_path,
        API_KEY="k" * 40,
        COMPRESSION='{"policy": "dycoke", "k": 0.5}',
        FPS=1,
        EXPIRES_AFTER_S=0,
    )
    answer, request = await answered(worker, webui.ask("What?", __files__=[webui.upload()]))
    assert answer == "t0 t1 " and request.compression["k"] == 0.5
    assert request.frames_wanted.num_frames == 10


async def test_no_file_but_an_upload_is_sent(
    webui: OpenWebUI, worker: ScriptedWorker, api: RunningApi, tmp_path: Path
) -> None:
    """The browser names a file's location; a forged one opens nothing."""
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(CLIP)
    link = webui.upload()
    Path(link["file"]["path"]).unlink()
    Path(link["file"]["path"]).symlink_to(secret)
    other = webui.upload()
    forged = [
        {"file": {**other["file"], "path": str(secret)}},
        {"file": {**other["file"], "path": f"{webui.folder}/../secret.mp4"}},
        {"file": {**other["file"], "id": "guessed"}},
        link,
    ]
    for entry in forged:
        answer = await webui.ask("What?", __files__=[entry])
        assert answer == "ERROR the uploaded video cannot be read"
    assert (await api.client.get("/v1/files")).json()["data"] == []
