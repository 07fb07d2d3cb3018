"""Two keys that try to see each other's ids, metadata and receipts."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from app.store.forgotten_videos import ForgottenVideos
from app.store.keys import RedisKeys
from tests.integration.api import CLIP, RunningApi, ScriptedWorker, running_api
from tests.integration.api_keys import KEYS, A, B
from tests.integration.conftest import AddKey, RedisServer


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
    assert api.readers.num_probes == 2, "nor does the time of a probe tell"
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


async def test_workers_know_one_video_of_two_keys_by_two_names(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    """What they keep of it, features and prefixes, goes by these."""
    requests = []
    for who in (A, B, A):
        post = asyncio.create_task(api.post(headers=who, stream=False))
        requests.append((await worker.answer()).request)
        assert (await post).status_code == 200
    assert len({request.video_id for request in requests}) == 1
    names = [(request.frames.digest, request.cached_video) for request in requests]
    assert names[0] == names[2]
    assert not set(names[0]) & set(names[1])


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


async def test_deleting_a_video_takes_its_frames_and_tells_the_workers(
    api: RunningApi, worker: ScriptedWorker, redis: Redis, keys: RedisKeys
) -> None:
    news = ForgottenVideos(redis, keys)
    assert await news.news() == []
    receipts = [await ask(api, worker, who) for who in (A, B)]
    assert len(await redis.hkeys(keys.frame_sizes)) == 2
    url = f"/v1/videos/{receipts[0]['video_id']}"
    assert (await api.client.delete(url, headers=A)).status_code == 204
    assert len(await redis.hkeys(keys.frame_sizes)) == 1
    (told,) = await news.news()
    assert str(receipts[0]["video_id"]) in told
    hit = (await ask(api, worker, B))["cache"]
    assert hit["frames"] == "hit", "what the other key has is its own"  # type: ignore[index]
    again = (await ask(api, worker, A))["cache"]
    assert again["frames"] == "miss"  # type: ignore[index]


async def test_shared_frames_go_with_the_last_key_that_has_the_video(
    redis_server: RedisServer,
    keys: RedisKeys,
    tmp_path: Path,
    worker: ScriptedWorker,
    redis: Redis,
) -> None:
    async with running_api(
        redis_server.url, keys, tmp_path, api_keys=KEYS, share_caches=True
    ) as api:
        receipts = [await ask(api, worker, who) for who in (A, B)]
        url = f"/v1/videos/{receipts[0]['video_id']}"
        assert (await api.client.delete(url, headers=A)).status_code == 204
        assert len(await redis.hkeys(keys.frame_sizes)) == 1
        assert (await api.client.delete(url, headers=B)).status_code == 204
        assert await redis.hkeys(keys.frame_sizes) == []


# --- usage ---


async def test_usage_is_each_keys_own(api: RunningApi, worker: ScriptedWorker) -> None:
    for _ in range(2):
        await ask(api, worker, A, num_frames=4)
    post = asyncio.create_task(api.post(headers=A, stream=False))
    delivery = await worker.take()
    await api.client.delete(f"/v1/jobs/{delivery.job_id}", headers=A)
    await post
    usage = (await api.client.get("/v1/usage", headers=A)).json()
    assert usage["key"] == "a"
    assert usage["total"] == {
        "jobs": 3,
        "jobs_done": 2,
        "jobs_error": 0,
        "jobs_cancelled": 1,
        "frames": 8,
        "visual_tokens": 32,
        "prompt_tokens": 40,
        "completion_tokens": 6,
        "uploads": 1,
        "upload_bytes": len(CLIP),
    }
    assert sum(day["jobs"] for day in usage["days"]) == 3
    other = (await api.client.get("/v1/usage", headers=B)).json()
    assert other["total"]["jobs"] == 0 and other["days"] == []
    refused = await api.client.get("/v1/usage/keys", headers=A)
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    assert (await api.client.get("/v1/usage?days=0", headers=A)).status_code == 400


async def test_administrators_see_the_usage_of_every_key(
    redis_server: RedisServer,
    keys: RedisKeys,
    tmp_path: Path,
    worker: ScriptedWorker,
    add_key: AddKey,
) -> None:
    root = add_key("root", "--scopes", "admin")
    async with running_api(redis_server.url, keys, tmp_path, api_keys=KEYS) as api:
        await ask(api, worker, A)
        usage = (await api.client.get("/v1/usage/keys", headers=root)).json()["data"]
        assert {of["key"]: of["total"]["jobs"] for of in usage} == {"a": 1, "b": 0, "root": 0}
        assert (await api.post(headers=root)).status_code == 403
