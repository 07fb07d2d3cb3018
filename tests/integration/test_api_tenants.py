"""Two keys who try to see each other: ids, metadata, receipts."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.store.keys import RedisKeys
from tests.integration.api import CLIP, RunningApi, ScriptedWorker, running_api, scripted_worker
from tests.integration.conftest import RedisServer

SECRETS = {name: f"key-of-{name}-" + "x" * 32 for name in "ab"}
A, B = ({"Authorization": f"Bearer {secret}"} for secret in SECRETS.values())
KEYS = ",".join(f"{name}:{secret}" for name, secret in SECRETS.items())


@pytest.fixture
async def worker(redis_server: RedisServer, keys: RedisKeys) -> AsyncIterator[ScriptedWorker]:
    async with scripted_worker(redis_server.url, keys) as worker:
        yield worker


@pytest.fixture
async def api(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> AsyncIterator[RunningApi]:
    async with running_api(redis_server.url, keys, tmp_path, api_keys=KEYS) as api:
        yield api


async def ask(
    api: RunningApi, worker: ScriptedWorker, headers: dict[str, str], **fields: object
) -> dict[str, object]:
    """Asks a question; returns the receipt."""
    post = asyncio.create_task(api.post(headers=headers, stream=False, **fields))
    await worker.answer()
    response = await post
    assert response.status_code == 200, response.text
    receipt: dict[str, object] = response.json()
    return receipt


async def test_foreign_ids_are_those_of_nothing(api: RunningApi, worker: ScriptedWorker) -> None:
    receipt = await ask(api, worker, A)
    job, video = f"/v1/jobs/{receipt['job_id']}", f"/v1/videos/{receipt['video_id']}"
    no_job, no_video = "/v1/jobs/job_" + "0" * 32, "/v1/videos/vid_" + "0" * 64
    for method, foreign, missing in (
        ("GET", job, no_job),
        ("DELETE", job, no_job),
        ("GET", f"{job}/events", f"{no_job}/events"),
        ("GET", video, no_video),
        ("DELETE", video, no_video),
    ):
        replies = [await api.client.request(method, url, headers=B) for url in (foreign, missing)]
        assert [r.status_code for r in replies] == [404, 404], (method, foreign)
        assert replies[0].json() == replies[1].json()
    for video_id in (receipt["video_id"], "vid_" + "0" * 64):
        asked = await api.post(clip=None, headers=B, video_id=video_id)
        assert (asked.status_code, asked.json()["code"]) == (404, "video_not_found")
    for url in (job, video):
        assert (await api.client.get(url, headers=A)).status_code == 200
    assert (await api.client.get(job, headers=A)).json()["state"] == "done"


async def test_same_bytes_are_a_new_video_to_another_key(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    uploads = [
        (await api.client.post("/v1/videos", files={"video": CLIP}, headers=who)).json()
        for who in (A, B, A)
    ]
    assert len({video["video_id"] for video in uploads}) == 1
    assert uploads[0]["created_at_s"] < uploads[1]["created_at_s"]
    assert uploads[2] == uploads[0]
    assert api.readers.num_probes == 2, "what a probe takes tells nothing either"
    url = f"/v1/videos/{uploads[0]['video_id']}"
    assert (await api.client.delete(url, headers=A)).status_code == 204
    assert (await api.client.get(url, headers=A)).status_code == 404
    assert (await api.client.get(url, headers=B)).json() == uploads[1]


async def test_receipts_do_not_tell_that_another_key_has_asked(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    hits = [(await ask(api, worker, who))["cache"] for who in (A, B, A)]
    assert [cache["frames"] for cache in hits] == ["miss", "miss", "hit"]  # type: ignore[index]
    assert api.readers.num_reads == 2


async def test_read_under_way_is_not_shared_with_another_key(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    api.readers.may_read.clear()
    posts = [asyncio.create_task(api.post(headers=who, stream=False)) for who in (A, B)]
    async with asyncio.timeout(20):
        while api.readers.num_reads < 2:
            await asyncio.sleep(0.01)
    api.readers.may_read.set()
    for _ in posts:
        await worker.answer()
    for post in posts:
        assert (await post).json()["cache"]["frames"] == "miss"


async def test_caches_are_shared_where_the_operator_says_so(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with running_api(
        redis_server.url, keys, tmp_path, api_keys=KEYS, share_caches=True
    ) as api:
        hits = [(await ask(api, worker, who))["cache"] for who in (A, B)]
        assert [cache["frames"] for cache in hits] == ["miss", "hit"]  # type: ignore[index]


async def test_idempotency_keys_of_two_keys_never_meet(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    jobs = [
        (await ask(api, worker, {**who, "Idempotency-Key": "same"}))["job_id"] for who in (A, B)
    ]
    assert len(set(jobs)) == 2
