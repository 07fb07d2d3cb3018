"""Videos that come with a chat completion: in its body, by a URL, under a name."""

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from app.store.keys import RedisKeys
from tests.integration.api import (
    CLIP,
    MODEL,
    RunningApi,
    ScriptedWorker,
    raw_request,
    running_api,
)
from tests.integration.conftest import RedisServer
from tests.integration.openai_client import PATH, about, upload

LARGE_BYTES = 300 * 2**20


def data_url(clip: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(clip).decode()}"


@pytest.mark.parametrize(
    "form",
    [
        lambda url: {"type": "video_url", "video_url": {"url": url}},
        lambda url: {"type": "video_url", "video_url": url},
        lambda url: {"type": "video", "video": url},
        lambda url: {"type": "file", "file": {"file_data": url, "filename": "a.mp4"}},
    ],
)
async def test_a_video_may_come_in_the_body(
    form: Any, api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI
) -> None:
    content = [form(data_url(CLIP)), {"type": "text", "text": "What happens?"}]
    answering = asyncio.create_task(worker.answer(1))
    answer = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": content}]
    )
    video_id = (await answering).request.video_id
    assert video_id == await upload(api)
    assert answer.model_extra["dycoke"]["timings_s"]["upload"] > 0  # type: ignore[index]
    assert (await api.client.get(f"/v1/files/{video_id}/content")).content == CLIP


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        (data_url(b"GIF89a" + bytes(2000)), 415, "unsupported_container"),
        (data_url(b""), 415, "unsupported_container"),
        (data_url(CLIP, "image/png"), 400, "invalid_request"),
        (data_url(CLIP, "video/jpeg"), 400, "invalid_request"),
        (data_url(CLIP, "text/html"), 400, "invalid_request"),
        (data_url(bytes(5000)), 413, "upload_too_large"),
    ],
)
async def test_what_is_no_video_in_a_body_leaves_nothing(
    url: str,
    status: int,
    code: str,
    redis_server: RedisServer,
    keys: RedisKeys,
    tmp_path: Path,
    worker: ScriptedWorker,
) -> None:
    async with running_api(redis_server.url, keys, tmp_path, max_upload_bytes=4096) as api:
        response = await api.client.post(PATH, json={"messages": about(url)})
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        depth = await api.api.jobs.queue.depth(MODEL)
        assert depth.waiting == 0
        assert not [p for p in (tmp_path / "videos").rglob("*") if p.is_file()]


async def test_a_body_above_the_cap_is_refused_by_its_length(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with running_api(redis_server.url, keys, tmp_path, max_upload_bytes=4096) as api:
        head = (
            f"POST {PATH} HTTP/1.1\nHost: 127.0.0.1\nContent-Type: application/json\n"
            "Content-Length: 2000000\nConnection: close\n"
        )
        answer = await raw_request(api.port, head, b'{"messages"')
    assert b" 413 " in answer and b'"code": "upload_too_large"' in answer


async def test_a_video_may_be_named_by_a_url_that_is_allowed(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    media = tmp_path / "media"
    media.mkdir()
    (media / "clip.mp4").write_bytes(CLIP)
    (media / "text.mp4").write_bytes(b"no video" * 200)
    settings = {"allowed_media_path": media, "allowed_media_domains": "*"}
    async with running_api(redis_server.url, keys, tmp_path / "data", **settings) as api:
        answering = asyncio.create_task(worker.answer(1))
        body = {"messages": about(f"file://{media}/clip.mp4")}
        assert (await api.client.post(PATH, json=body)).status_code == 200
        assert (await answering).request.video_id == await upload(api)
        for url, status in (
            (f"file://{media}/text.mp4", 415),
            (f"file://{media}/../data", 400),
            (f"http://127.0.0.1:{api.port}/metrics", 400),
            ("http://127.0.0.1/metrics", 400),
        ):
            refused = await api.client.post(PATH, json={"messages": about(url)})
            assert refused.status_code == status, refused.text
            error = refused.json()["error"]
            assert status == 415 or error["param"] == "messages.0.content.1.video_url.url"
        assert (await api.api.jobs.queue.depth(MODEL)).waiting == 0


async def test_no_url_is_fetched_unless_it_is_allowed(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    for url in ("http://example.com/clip.mp4", "file:///etc/passwd"):
        response = await api.client.post(PATH, json={"messages": about(url)})
        assert response.status_code == 400


async def test_a_uuid_names_a_video_among_ones_own(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    settings = {"api_keys": f"a:{'a' * 40},b:{'b' * 40}"}
    async with running_api(redis_server.url, keys, tmp_path, **settings) as api:

        async def ask(key: str, part: dict[str, Any]) -> tuple[int, Any]:
            content = [{"type": "text", "text": "What?"}, {"type": "video_url", **part}]
            body = {"messages": [{"role": "user", "content": content}], "stream": True}
            headers = {"Authorization": f"Bearer {key * 40}"}
            async with api.client.stream("POST", PATH, json=body, headers=headers) as response:
                if response.status_code != 200:
                    return response.status_code, json.loads(await response.aread())["error"]
                return 200, (await worker.answer(1)).request.video_id

        first = {"video_url": {"url": data_url(CLIP)}, "uuid": "mine"}
        status, video_id = await ask("a", first)
        assert status == 200
        for part in (
            {"video_url": {"url": ""}, "uuid": "mine"},
            {"video_url": None, "uuid": "mine"},
            {"video_url": {"url": None, "uuid": "mine"}},
        ):
            assert await ask("a", part) == (200, video_id)
        status, error = await ask("b", {"video_url": None, "uuid": "mine"})
        assert (status, error["code"]) == (404, "video_not_found")
        status, error = await ask("b", {"video_url": None})
        assert (status, error["param"]) == (400, "messages.0.content.1.video_url")
        status, error = await ask("b", {"video_url": video_id, "uuid": 5})
        assert (status, error["param"]) == (400, "messages.0.content.1.uuid")


@pytest.mark.slow
async def test_a_body_of_hundreds_of_megabytes_takes_a_few(
    api_for_large: RunningApi, worker: ScriptedWorker
) -> None:
    """The client is in this process, too, and makes the body as it goes."""
    piece = base64.b64encode(bytes(3 * 2**18))
    clip = CLIP + bytes(-len(CLIP) % 3)
    content = [{"type": "text", "text": "What happens?"}, {"type": "video_url", "video_url": "@"}]
    head, tail = json.dumps({"messages": [{"role": "user", "content": content}]}).split("@")

    async def body() -> AsyncIterator[bytes]:
        yield f"{head}data:video/mp4;base64,".encode()
        yield base64.b64encode(clip)
        for _ in range(LARGE_BYTES // (3 * 2**18)):
            yield piece
        answering.append(asyncio.create_task(worker.answer(1)))
        yield tail.encode()

    answering: list[asyncio.Task[Any]] = []
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = peak_bytes()
    headers = {"Content-Type": "application/json"}
    reply = await api_for_large.client.post(PATH, content=body(), headers=headers, timeout=120)
    assert reply.status_code == 200, reply.text
    assert (await answering[0]).request.video_id is not None
    assert peak_bytes() - before < LARGE_BYTES / 10


def peak_bytes() -> int:
    """The most resident memory of this process since it was last asked to count from there."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024


@pytest.fixture
async def api_for_large(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> AsyncIterator[RunningApi]:
    async with running_api(
        redis_server.url, keys, tmp_path, max_upload_bytes=2 * LARGE_BYTES
    ) as api:
        yield api
