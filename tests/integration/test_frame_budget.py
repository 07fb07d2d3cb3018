"""The frame budget: bytes are reserved before frames are read, and given back however a job
ends."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from redis.asyncio import Redis

from app.store.client import connect
from app.store.frame_store import FrameStore, max_blob_bytes
from app.store.keys import RedisKeys
from dycoke_core.video import FrameSpec
from tests.integration.api import (
    CLIP,
    RunningApi,
    ScriptedWorker,
    running_api,
    scripted_worker,
    until,
)
from tests.integration.conftest import RedisServer
from tests.integration.test_api_processes import Processes, running
from tests.integration.workers import wait_until

MIB = 2**20
SMALL = max_blob_bytes(FrameSpec(num_frames=32, image_size=8), 0, 0)  # of a post without more words


@pytest.fixture
async def api(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> AsyncIterator[RunningApi]:
    async with running_api(
        redis_server.url, keys, tmp_path, max_frame_store_bytes=2 * SMALL
    ) as api:
        yield api


async def upload(api: RunningApi) -> str:
    reply = await api.client.post("/v1/videos", files={"video": CLIP})
    return str(reply.json()["video_id"])


def ask(api: RunningApi, video_id: str, **fields: object) -> "asyncio.Task[httpx.Response]":
    return asyncio.create_task(api.post(clip=None, video_id=video_id, stream=False, **fields))


async def reserved_bytes(redis: Redis, keys: RedisKeys) -> int:
    total = int(await redis.get(keys.frame_bytes) or 0)
    assert total == sum(map(int, await redis.hvals(keys.frame_sizes)))
    return total


async def test_what_does_not_fit_is_refused_before_it_is_read(
    api: RunningApi, worker: ScriptedWorker, redis: Redis, keys: RedisKeys
) -> None:
    video_id = await upload(api)
    api.readers.may_read.clear()
    posts = [ask(api, video_id, start_s=float(second)) for second in range(2)]
    await until(lambda: api.readers.num_reads == 2)
    refused = await api.post(clip=None, video_id=video_id, start_s=2.0)
    assert (refused.status_code, refused.json()["code"]) == (503, "frame_store_full")
    assert refused.json()["retryable"] and refused.json()["video_id"] == video_id
    assert int(refused.headers["Retry-After"]) > 0
    assert api.readers.num_reads == 2
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 2, "it keeps no place"
    api.readers.may_read.set()
    for _ in posts:
        await worker.answer()
    assert [(await post).status_code for post in posts] == [200, 200]
    again = ask(api, video_id, start_s=2.0)
    await worker.answer()
    assert (await again).status_code == 200
    assert await reserved_bytes(redis, keys) <= 2 * SMALL


async def test_reservation_goes_with_a_job_that_fails_or_is_cancelled(
    api: RunningApi, worker: ScriptedWorker, redis: Redis, keys: RedisKeys
) -> None:
    video_id = await upload(api)
    api.readers.may_read.clear()
    api.readers.read_error = ValueError("no frames")
    failing = ask(api, video_id)
    await until(lambda: api.readers.num_reads == 1)
    assert await reserved_bytes(redis, keys) == SMALL
    api.readers.may_read.set()
    assert (await failing).status_code == 500
    assert await reserved_bytes(redis, keys) == 0
    api.readers.may_read.clear()
    async with api.posting(clip=None, video_id=video_id) as reply:
        assert await reserved_bytes(redis, keys) == SMALL
        job_id = reply.headers["X-Job-Id"]
        assert (await api.client.delete(f"/v1/jobs/{job_id}")).is_success
    assert await reserved_bytes(redis, keys) == 0


async def test_times_less_than_a_hundredth_of_a_second_apart_share_their_frames(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    video_id = await upload(api)
    receipts = []
    for number in range(4):
        end_s = 5.0 + (number + 1) * 1e-6
        post = ask(api, video_id, start_s=1.5 + number * 1e-3, end_s=end_s)
        await worker.answer()
        receipts.append((await post).json())
    assert api.readers.num_reads == 1
    assert [receipt["cache"]["frames"] for receipt in receipts] == ["miss", "hit", "hit", "hit"]
    assert {(r["frames"]["start_s"], r["frames"]["end_s"]) for r in receipts} == {(1.5, 5.01)}


async def test_jobs_that_wait_for_the_same_frames_send_them_once(
    api: RunningApi, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    put_and_pin = FrameStore.put_and_pin

    async def counted(store: FrameStore, digest: str, *args: Any) -> None:
        sent.append(digest)
        await put_and_pin(store, digest, *args)

    monkeypatch.setattr(FrameStore, "put_and_pin", counted)
    video_id = await upload(api)
    api.readers.may_read.clear()
    posts = [ask(api, video_id, seed=number) for number in range(5)]
    async with asyncio.timeout(20):
        while (await api.api.jobs.queue.depth("tiny")).waiting < len(posts):
            await asyncio.sleep(0.01)
    api.readers.may_read.set()
    for _ in posts:
        await worker.answer()
    assert [(await post).status_code for post in posts] == [200] * len(posts)
    assert len(sent) == 1


async def test_request_that_no_budget_could_hold_is_wrong(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    video_id = await upload(api)
    refused = await api.post(clip=None, video_id=video_id, num_frames=128)
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid_request")
    assert "num_frames" in refused.text and not refused.json()["retryable"]
    assert api.readers.num_reads == 0


async def test_frames_in_hand_wait_for_their_turn(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with running_api(
        redis_server.url, keys, tmp_path, max_held_frame_bytes=SMALL, max_frame_readers=2
    ) as api:
        video_id = await upload(api)
        api.readers.may_read.clear()
        posts = [ask(api, video_id, start_s=float(second)) for second in range(3)]
        async with asyncio.timeout(20):
            while "dycoke_reader_jobs 3" not in await api.metrics():
                await asyncio.sleep(0.01)
        await until(lambda: api.readers.num_reads > 0)
        await asyncio.sleep(0.2)  # in which another read would begin
        assert api.readers.num_reads == 1, "one is held, though another reader is free"
        api.readers.may_read.set()
        for _ in posts:
            await worker.answer()
        assert [(await post).status_code for post in posts] == [200] * 3


# --- sixty small posts, each worth megabytes ---

NUM_POSTS = 60
NUM_FRAMES, IMAGE_SIZE = 64, 256
LARGE = max_blob_bytes(FrameSpec(NUM_FRAMES, IMAGE_SIZE), 0, 0)  # 13 MB


async def test_sixty_posts_take_no_more_memory_than_their_budget(
    own_redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> None:
    redis = connect(own_redis_server.url)
    async with (
        scripted_worker(own_redis_server.url, keys, image_size=IMAGE_SIZE),
        running(
            own_redis_server.url,
            keys,
            tmp_path,
            DYCOKE_MAX_FRAME_STORE_BYTES=str(3 * LARGE),
            DYCOKE_MAX_HELD_FRAME_BYTES=str(LARGE),
            DYCOKE_MAX_QUEUED_JOBS=str(4 * NUM_POSTS),  # each takes two places
        ) as service,
    ):
        video_id = await service.upload()
        pids = [service.pid_of(slot) for slot in range(2)]
        before = sum(psutil.Process(pid).memory_info().rss for pid in pids)
        redis_before = (await redis.info("memory"))["used_memory"]

        ends = [0.5 + 0.02 * number for number in range(NUM_POSTS)]
        replies = await asyncio.gather(*(_post(service, video_id, end_s) for end_s in ends))
        jobs = [job_id for status, job_id in replies if status == 200]
        assert len(jobs) == 3, "as many as fit"
        refusals = [code for status, code in replies if status != 200]
        assert refusals == ["frame_store_full"] * (NUM_POSTS - 3)
        await wait_until(lambda: _are_in_state(service, jobs, "queued"))

        assert sum(map(_peak_rss, pids)) - before < 6 * LARGE + 64 * MIB
        redis_peak = (await redis.info("memory"))["used_memory_peak"]
        assert redis_peak - redis_before < (3 + 6) * LARGE  # those on their way: in its buffers
        assert await reserved_bytes(redis, keys) <= 3 * LARGE

        status, code = await _post(service, video_id, ends[-1] + 1.0)
        assert (status, code) == (503, "frame_store_full")
        for job_id in jobs:
            await service.client.delete(f"{service.url}/v1/jobs/{job_id}")
        assert await reserved_bytes(redis, keys) == await _stored_bytes(redis, keys)
        assert not await redis.keys(keys.frame_upload("*"))
        status, job_id = await _post(service, video_id, ends[-1] + 1.0)
        assert status == 200
        await service.client.delete(f"{service.url}/v1/jobs/{job_id}")
    await redis.aclose()


async def _post(service: Processes, video_id: str, end_s: float) -> tuple[int, str]:
    """Returns the status, and the job's id or the error's code. The job continues."""
    body = {
        "question": "What happens?",
        "video_id": video_id,
        "num_frames": NUM_FRAMES,
        "end_s": end_s,
        "on_disconnect": "continue",
    }
    url = f"{service.url}/v1/video/chat"
    async with service.client.stream("POST", url, json=body) as reply:
        if reply.status_code == 200:
            return 200, reply.headers["X-Job-Id"]
        await reply.aread()
        return reply.status_code, str(reply.json()["code"])


async def _are_in_state(service: Processes, jobs: Sequence[str], state: str) -> bool:
    replies = [await service.get(f"/v1/jobs/{job_id}") for job_id in jobs]
    return all(reply.json()["state"] == state for reply in replies)


async def _stored_bytes(redis: Redis, keys: RedisKeys) -> int:
    return sum([await redis.strlen(key) for key in await redis.keys(keys.frames("*"))])


def _peak_rss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel says nothing of a peak")
