"""A stopping API: open answers finish, jobs survive, clients resume elsewhere."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from app.store.keys import RedisKeys
from tests.integration.api import (
    CLIP,
    PATIENCE_S,
    EventReader,
    ScriptedWorker,
    parse_events,
    raw_request,
    running_api,
    until,
    until_state,
)
from tests.integration.conftest import RedisServer


async def test_draining_api_refuses_posts_and_lets_answers_finish(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with running_api(redis_server.url, keys, tmp_path) as api:
        post = asyncio.create_task(api.post())
        delivery = await worker.take()
        await worker.say(delivery, 0)
        api.server.begin_drain()
        ready = await api.client.get("/readyz")
        assert (ready.status_code, ready.json()["code"]) == (503, "shutting_down")
        assert (await api.client.get("/livez")).status_code == 200
        refused = await api.post()
        assert (refused.status_code, refused.json()["code"]) == (503, "shutting_down")
        await worker.say(delivery, 1)
        await worker.finish(delivery, 2)
        assert parse_events((await post).text)[-1].name == "done"
        await asyncio.wait_for(asyncio.shield(api.serving), PATIENCE_S)


async def test_stream_cut_by_shutdown_resumes_at_another_api(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with (
        running_api(redis_server.url, keys, tmp_path, drain_timeout_s=0.2) as api,
        running_api(redis_server.url, keys, tmp_path) as other,
    ):
        async with api.posting() as response:
            delivery = await worker.take()
            await worker.say(delivery, 0)
            reader = EventReader(response)
            seen = await reader.until("token", index=0)
            api.server.begin_drain()
            assert await reader.rest() == []
        await asyncio.wait_for(asyncio.shield(api.serving), PATIENCE_S)
        assert (await until_state(other, delivery.job_id, "running"))["error"] is None
        assert await worker.say(delivery, 1)
        await worker.finish(delivery, 2)
        resumed = await other.client.get(
            f"/v1/jobs/{delivery.job_id}/events", headers={"Last-Event-ID": seen.id or ""}
        )
        assert [e.name for e in parse_events(resumed.text)] == ["token", "done"]


async def test_whole_answer_cut_by_shutdown_names_its_job(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with running_api(redis_server.url, keys, tmp_path, drain_timeout_s=0.2) as api:
        post = asyncio.create_task(api.post(stream=False))
        delivery = await worker.take()
        api.server.begin_drain()
        response = await post
        assert (response.status_code, response.json()["code"]) == (503, "shutting_down")
        assert response.json()["job_id"] == delivery.job_id
        assert await worker.say(delivery, 0)


async def test_upload_and_reading_cut_by_shutdown_end_retryable_where_none_has_the_video(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with (
        running_api(redis_server.url, keys, tmp_path, drain_timeout_s=0.3) as api,
        running_api(redis_server.url, keys, tmp_path / "other") as other,
    ):
        api.readers.may_read.clear()
        async with api.posting() as response:
            job_id = response.headers["x-job-id"]
            head = (
                "POST /v1/video/chat HTTP/1.1\nhost: localhost\n"
                "content-type: multipart/form-data; boundary=b\ncontent-length: 1000\n"
            )
            upload = asyncio.create_task(raw_request(api.port, head, b"--b\r\n"))
            incoming = tmp_path / "videos" / "incoming"
            await until(lambda: len(list(incoming.iterdir())) == 1)
            api.server.begin_drain()
            reply = await upload
            await response.aread()
        assert reply.startswith(b"HTTP/1.1 503 ") and b'"shutting_down"' in reply
        await asyncio.wait_for(asyncio.shield(api.serving), PATIENCE_S)
        job = await until_state(other, job_id, "error")
        assert (job["error"]["code"], job["error"]["retryable"]) == ("reader_lost", True)
        assert (await other.api.jobs.queue.depth("tiny")).waiting == 0


async def test_reading_of_an_api_that_stops_goes_on_at_another(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with (
        running_api(redis_server.url, keys, tmp_path, drain_timeout_s=0.1) as api,
        running_api(redis_server.url, keys, tmp_path) as other,
    ):
        api.readers.may_read.clear()
        async with api.posting() as response:
            job_id = response.headers["x-job-id"]
            api.server.begin_drain()
            await response.aread()
        assert (await worker.answer()).job_id == job_id
        assert other.readers.num_reads == 1
        job = await until_state(other, job_id, "done", "error")
        assert job["state"] == "done"


async def test_reading_of_a_killed_api_goes_on_at_another(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with (
        running_api(redis_server.url, keys, tmp_path, lease_s=0.5) as api,
        running_api(redis_server.url, keys, tmp_path) as other,
    ):
        api.readers.may_read.clear()
        async with api.posting() as response:
            reader = EventReader(response)
            await reader.until("status", stage="reading_frames")
            await stop_renewing_places()
            delivery = await worker.answer()
            assert (await reader.rest())[-1].name == "done"
        assert other.readers.num_reads == 1
        assert delivery.request.frames is not None
        assert delivery.request.frames.indices == list(range(32))
        assert (await other.api.jobs.queue.depth("tiny")).waiting == 0


async def stop_renewing_places() -> None:
    """What a SIGKILL of an API does to its places, which are about to be renewed."""

    def renewing() -> list[asyncio.Task[object]]:
        return [task for task in asyncio.all_tasks() if "Place._renew" in repr(task.get_coro())]

    await until(lambda: bool(renewing()))
    for task in renewing():
        task.cancel()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/jobs/j"),
        ("DELETE", "/v1/jobs/j"),
        ("GET", "/v1/jobs/j/events"),
        ("POST", "/v1/video/chat"),
        ("GET", "/v1/usage"),
    ],
)
async def test_shutdown_while_redis_does_not_answer_says_so_on_every_route(
    own_redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, method: str, path: str
) -> None:
    async with running_api(own_redis_server.url, keys, tmp_path, drain_timeout_s=0.2) as api:
        body = {"question": "?", "video_id": "v"} if method == "POST" else None
        own_redis_server.pause()
        try:
            request = asyncio.create_task(api.client.request(method, path, json=body))
            await asyncio.sleep(0.3)
            api.server.begin_drain()
            response = await request
        finally:
            own_redis_server.resume()
        assert response.status_code == 503
        assert response.headers["content-type"] == "application/problem+json"
        problem = response.json()
        assert (problem["code"], problem["retryable"]) == ("shutting_down", True)


# --- the process ---


@asynccontextmanager
async def api_process(
    redis_url: str, keys: RedisKeys, data_dir: Path, **settings: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("DYCOKE_")}
    env |= {
        "DYCOKE_REDIS_URL": redis_url,
        "DYCOKE_REDIS_PREFIX": keys.prefix,
        "DYCOKE_DATA_DIR": str(data_dir),
        "DYCOKE_PORT": "0",
        **settings,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app", "api", env=env, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        port = 0
        async with asyncio.timeout(60):
            while not port:
                line = await process.stderr.readline()
                assert line, "the process ended"
                if b"listening on" in line:
                    port = int(line.split(b"listening on http://127.0.0.1:")[1].split(b'"')[0])
        yield process, port
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_sigterm_drains_the_process_and_it_exits_with_0(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with api_process(redis_server.url, keys, tmp_path, DYCOKE_DRAIN_TIMEOUT_S="20") as (
        process,
        port,
    ):
        base_url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as client:
            assert (await client.get("/readyz")).status_code == 200
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(PATIENCE_S):
                assert await process.wait() == 0


async def test_killed_process_leaves_what_it_read_to_another(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with (
        running_api(redis_server.url, keys, tmp_path) as other,
        api_process(redis_server.url, keys, tmp_path, DYCOKE_LEASE_S="1") as (process, port),
    ):
        uploaded = await other.client.post("/v1/videos", files={"video": CLIP})
        readers = psutil.Process(process.pid).children()
        for reader in readers:
            reader.suspend()  # it will never have read the video
        body = {"question": "?", "video_id": uploaded.json()["video_id"]}
        url = f"http://127.0.0.1:{port}/v1/video/chat"
        async with (
            httpx.AsyncClient(timeout=PATIENCE_S) as client,
            client.stream("POST", url, json=body) as response,
        ):
            job_id = response.headers["x-job-id"]
            process.kill()
        for reader in readers:
            reader.resume()
        assert (await worker.answer()).job_id == job_id
        assert (await until_state(other, job_id, "done", "error"))["state"] == "done"


async def test_second_signal_skips_the_wait(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with running_api(redis_server.url, keys, tmp_path) as api:
        post = asyncio.create_task(api.post())
        delivery = await worker.take()
        api.server.begin_drain()
        await asyncio.sleep(0.1)
        assert not api.serving.done()
        api.server.begin_drain()
        assert parse_events((await post).text)[-1].name != "done"
        await until(api.serving.done)
        assert await worker.say(delivery, 0)


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("DYCOKE_DEFAULT_COMPRESSION", "fancy", "DYCOKE_DEFAULT_COMPRESSION"),
        ("DYCOKE_HOST", "203.0.113.7", "address"),
        ("DYCOKE_ALLOW_ANONYMOUS", "maybe", "DYCOKE_ALLOW_ANONYMOUS"),
    ],
)
async def test_setting_that_cannot_work_ends_the_process_with_one_line(
    redis_server: RedisServer, tmp_path: Path, name: str, value: str, word: str
) -> None:
    env = {**os.environ, "DYCOKE_REDIS_URL": redis_server.url, "DYCOKE_DATA_DIR": str(tmp_path)}
    env |= {"DYCOKE_PORT": "0", "DYCOKE_LOG_LEVEL": "WARNING"}
    env |= {"DYCOKE_ALLOW_ANONYMOUS": "true", name: value}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app", "api", env=env, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        _, errors = await process.communicate()
    assert process.returncode == 2
    assert word in errors.decode()
    assert errors.count(b"\n") == 1, errors.decode()
