"""Files, models and expiry with the real OpenAI client against a real server."""

import asyncio
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from PIL import Image
from redis.asyncio import Redis

from dycoke_core.video import VideoFrames
from tests.integration.api import (
    CLIP,
    MODEL,
    RunningApi,
    ScriptedWorker,
    until,
)
from tests.integration.openai_client import about


async def create(client: AsyncOpenAI, clip: bytes = CLIP, **options: Any) -> Any:
    options = {"purpose": "user_data", **options}
    return await client.files.create(file=("holiday.mp4", clip), **options)


async def test_a_file_goes_round(
    api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI
) -> None:
    file = await create(client)
    assert (file.object, file.bytes, file.status) == ("file", len(CLIP), "processed")
    assert (file.purpose, file.expires_at) == ("user_data", None)
    assert file.filename == f"{file.id}.mp4"  # the client's name is not kept
    assert (await client.files.retrieve(file.id)) == file
    video = (await api.client.get(f"/v1/videos/{file.id}")).json()
    assert (video["video_id"], video["num_bytes"]) == (file.id, len(CLIP))
    assert (await client.files.content(file.id)).content == CLIP
    answering = asyncio.create_task(worker.answer(1))
    await client.chat.completions.create(model=MODEL, messages=about(file.id))
    assert (await answering).request.video_id == file.id
    deleted = await client.files.delete(file.id)
    assert (deleted.id, deleted.deleted) == (file.id, True)
    with pytest.raises(openai.NotFoundError) as gone:
        await client.files.retrieve(file.id)
    assert gone.value.code == "video_not_found"
    assert (await api.client.get(f"/v1/videos/{file.id}")).status_code == 404


async def test_files_are_listed_page_by_page(api: RunningApi, client: AsyncOpenAI) -> None:
    files = [await create(client, CLIP + bytes([number])) for number in range(3)]
    vision = await create(client, CLIP + b"v", purpose="vision")
    ids = [file.id for file in (*files, vision)]
    listed = await client.files.list()
    assert [file.id for file in listed.data] == ids[::-1] and not listed.has_more
    assert [f.id async for f in client.files.list(order="asc", limit=2)] == ids
    assert [f.id async for f in client.files.list(purpose="vision")] == [vision.id]
    with pytest.raises(openai.BadRequestError) as unknown:
        await client.files.list(after="vid_x")
    assert unknown.value.param == "after"


async def test_a_long_list_comes_in_parts_whatever_is_asked_for(
    api: RunningApi, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.routes.files.MAX_PAGE", 2)
    ids = [(await create(client, CLIP + bytes([number]))).id for number in range(5)]
    first = await client.files.list(order="asc", limit=10_000)
    assert [file.id for file in first.data] == ids[:2] and first.has_more
    assert [f.id async for f in client.files.list(order="asc", limit=10_000)] == ids


@pytest.mark.parametrize("path", ["/v1/files/{}/content", "/v1/videos/{}/content"])
async def test_content_comes_by_range(path: str, api: RunningApi, client: AsyncOpenAI) -> None:
    url = path.format((await create(client)).id)
    part = await api.client.get(url, headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    assert part.headers["content-range"] == f"bytes 4-7/{len(CLIP)}"
    whole = await api.client.get(url)
    assert (whole.status_code, whole.content) == (200, CLIP)
    assert whole.headers["content-type"] == "video/mp4"
    assert whole.headers["content-security-policy"] == "sandbox"
    assert whole.headers["x-content-type-options"] == "nosniff"
    beyond = await api.client.get(url, headers={"Range": f"bytes={len(CLIP)}-"})
    assert beyond.status_code == 416 and "range_not_satisfiable" in beyond.text
    await until(lambda: api.api.streams.num_open == 0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "assistants"}, "purpose"),
        ({"purpose": "user_data", "expires_after": "0"}, "expires_after"),
        ({"purpose": "user_data", "expires_after": "1e99"}, "expires_after"),
        ({"purpose": "user_data", "expires_after": "true"}, "expires_after"),
        ({"purpose": "user_data", "expires_after[anchor]": "now"}, "expires_after"),
        ({"purpose": "user_data", "expires_after[seconds]": "-1"}, "expires_after"),
        ({"purpose": "user_data", "expires_after": '{"seconds": 5, "more": 1}'}, "expires_after"),
    ],
)
async def test_what_is_wrong_with_an_upload_is_named(
    fields: dict[str, str], param: str, api: RunningApi
) -> None:
    response = await api.client.post("/v1/files", data=fields, files={"file": CLIP})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_what_is_no_video_is_refused(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        await create(client, b"GIF89a" + bytes(2000))
    assert (refused.value.status_code, refused.value.code) == (415, "unsupported_container")
    assert refused.value.type == "invalid_request_error"


async def test_a_video_expires_with_all_that_is_kept_of_it(
    api: RunningApi,
    worker: ScriptedWorker,
    client: AsyncOpenAI,
    redis: Redis,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    expiry: Any = {"anchor": "created_at", "seconds": 3600}
    file = await create(client, expires_after=expiry)
    assert file.expires_at - file.created_at in (3599, 3600)
    answering = asyncio.create_task(worker.answer(1))
    await client.chat.completions.create(model=MODEL, messages=about(file.id))
    await answering
    assert await redis.keys(f"{api.settings.redis_prefix}:frames:*")
    video = await api.client.post(
        "/v1/videos", files={"video": CLIP}, data={"expires_after": "7200"}
    )
    later = video.json()["expires_at_s"]
    assert later - file.expires_at == pytest.approx(3600, abs=60)  # the later end stands

    monkeypatch.setattr("app.video_store.types.time", SimpleNamespace(time=lambda: later))
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(file.id)
    assert (await client.files.list()).data == []
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model=MODEL, messages=about(file.id))
    await api.api.uploads.expire()
    assert not list((tmp_path / "videos").glob("vid_*"))
    assert not await redis.keys(f"{api.settings.redis_prefix}:frames:*")
    assert await redis.xlen(f"{api.settings.redis_prefix}:forgettings") == 1  # for workers


async def test_models_have_what_clients_read(
    api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI
) -> None:
    (model,) = (await client.models.list()).data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "dycoke")
    assert model.created > 0
    assert model.model_extra is not None
    assert (model.model_extra["root"], model.model_extra["max_model_len"]) == (MODEL, 4096)
    assert await client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.models.retrieve("some/other")
    assert unknown.value.code == "model_not_found"


async def test_a_frame_is_what_the_model_saw(
    api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI, redis: Redis
) -> None:
    file = await create(client)
    read = api.readers.read

    async def read_coloured(*args: Any, **options: Any) -> VideoFrames:
        frames = await read(*args, **options)
        for index, frame in enumerate(frames.pixels):
            frame[:] = (index, 2 * index, 200)
        return frames

    api.readers.read = read_coloured  # type: ignore[method-assign]
    answering = asyncio.create_task(worker.answer(1))
    answer = await client.chat.completions.create(model=MODEL, messages=about(file.id))
    await answering
    job_id = answer.id.removeprefix("chatcmpl-")
    url = f"/v1/videos/{file.id}/frames/5"
    response = await api.client.get(url, params={"job_id": job_id})
    assert response.headers["content-type"] == "image/png"
    assert (response.headers["x-frame-index"], response.headers["x-frame-timestamp-s"]) == (
        "5",
        "5.0",
    )
    with Image.open(io.BytesIO(response.content)) as image:
        assert image.size == (8, 8) and image.getpixel((3, 3)) == (5, 10, 200)
    for path, params, status in (
        (f"/v1/videos/{file.id}/frames/32", {"job_id": job_id}, 400),
        (f"/v1/videos/{file.id}/frames/-1", {"job_id": job_id}, 400),
        (url, {"job_id": "job_unknown"}, 404),
        (url, {}, 400),
        (f"/v1/videos/vid_{'0' * 64}/frames/5", {"job_id": job_id}, 404),
    ):
        assert (await api.client.get(path, params=params)).status_code == status
    prefix = api.settings.redis_prefix
    await redis.delete(*await redis.keys(f"{prefix}:frames:*"))
    gone = await api.client.get(url, params={"job_id": job_id})
    assert (gone.status_code, gone.json()["code"]) == (404, "video_not_found")
