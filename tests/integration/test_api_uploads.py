"""Videos that are uploaded once, found by their content, and deleted."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.store.keys import RedisKeys
from dycoke_core.errors import UnsupportedCodecError
from tests.integration.api import (
    CLIP,
    EventReader,
    RunningApi,
    ScriptedWorker,
    running_api,
)
from tests.integration.conftest import RedisServer

MAX_UPLOAD_BYTES = 2**20


@pytest.fixture
async def api(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> AsyncIterator[RunningApi]:
    async with running_api(
        redis_server.url, keys, tmp_path, max_upload_bytes=MAX_UPLOAD_BYTES
    ) as api:
        yield api


async def test_video_is_uploaded_once_and_found_by_its_content(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    first = await api.client.post("/v1/videos", files={"video": ("../x.mp4", CLIP)})
    assert first.status_code == 201
    video = first.json()
    assert video["num_bytes"] == len(CLIP)
    assert video["probe"]["codec"] == "h264"
    second = await api.client.post("/v1/videos", files={"video": CLIP})
    assert second.json() == video
    assert api.readers.num_probes == 1
    url = f"/v1/videos/{video['video_id']}"
    assert (await api.client.get(url)).json() == video
    assert (await api.client.delete(url)).status_code == 204
    assert (await api.client.get(url)).status_code == 404
    asked = await api.post(clip=None, video_id=video["video_id"])
    assert (asked.status_code, asked.json()["code"]) == (404, "video_not_found")
    names = {p.name for p in (api.settings.data_dir / "videos").rglob("*")}
    assert names == {"incoming", "owners", ".lock"}


async def test_deleted_video_is_gone_at_once_and_the_job_that_reads_it_goes_on(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    api.readers.may_read.clear()
    async with api.posting() as response:
        reader = EventReader(response)
        job = await reader.until("job")
        url = f"/v1/videos/{job.data['video_id']}"
        assert (await api.client.delete(url)).status_code == 204
        for method in ("GET", "DELETE"):
            assert (await api.client.request(method, url)).status_code == 404
        api.readers.may_read.set()
        await worker.answer()
        await reader.until("done")
    await api.api.videos.tidy()
    assert [p.name for p in (api.settings.data_dir / "videos").rglob("vid_*")] == []


@pytest.mark.parametrize("video_id", ["x", "..%2F..%2Fetc%2Fpasswd", "vid_" + "A" * 64, "vid_"])
async def test_malformed_video_id_is_a_404(api: RunningApi, video_id: str) -> None:
    for method in ("GET", "DELETE"):
        response = await api.client.request(method, f"/v1/videos/{video_id}")
        assert response.status_code == 404


async def test_upload_refuses_what_chat_would(api: RunningApi, worker: ScriptedWorker) -> None:
    assert (await api.client.post("/v1/videos", files={"video": b"text"})).status_code == 415
    assert (await api.client.post("/v1/videos", files={"other": CLIP})).status_code == 400
    mixed = await api.client.post("/v1/videos", files={"video": CLIP}, data={"x": "1"})
    assert mixed.json()["errors"][0]["field"] == "x"
    large = await api.client.post("/v1/videos", files={"video": CLIP + bytes(MAX_UPLOAD_BYTES)})
    assert large.status_code == 413
    api.readers.probe_error = UnsupportedCodecError("the codec is not taken")
    assert (await api.client.post("/v1/videos", files={"video": CLIP})).status_code == 415
