"""Clients that leave: while they send, while they wait, while they read."""

import asyncio
from pathlib import Path

import pytest

from app.errors import StoreUnavailableError
from app.store.keys import RedisKeys
from tests.integration.api import (
    CLIP,
    PATIENCE_S,
    RunningApi,
    ScriptedWorker,
    only_job,
    running_api,
    scripted_worker,
    until,
    until_state,
)
from tests.integration.conftest import RedisServer


async def test_closing_while_uploading_frees_the_disk_and_has_held_no_place(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", api.port)
    boundary = "b"
    body = (
        (
            f'--{boundary}\r\ncontent-disposition: form-data; name="video"; filename="x"\r\n\r\n'
        ).encode()
        + b"\x00\x00\x00\x18ftypmp42"
        + bytes(3 * 2**20)
    )
    writer.write(
        b"POST /v1/video/chat HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999\r\n"
        b"content-type: multipart/form-data; boundary=b\r\n\r\n" + body
    )
    await writer.drain()
    await until(lambda: any(p.stat().st_size for p in incoming(api)))
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0
    writer.close()
    await until(lambda: incoming(api) == [])
    assert api.api.videos.room.used_bytes == 0


async def test_closing_while_probing_kills_the_probe(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    api.readers.may_probe.clear()
    post = asyncio.create_task(api.post(on_disconnect="continue"))
    await until(lambda: api.readers.num_probes == 1)
    post.cancel()
    await until(lambda: api.readers.num_cancelled == 1)
    await until(lambda: incoming(api) == [])
    async with asyncio.timeout(PATIENCE_S):
        while (await api.api.jobs.queue.depth("tiny")).waiting:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
async def test_closing_while_frames_are_read_cancels_the_job(
    api: RunningApi, worker: ScriptedWorker, stream: bool
) -> None:
    api.readers.may_read.clear()
    post = asyncio.create_task(api.post(stream=stream))
    await until(lambda: api.readers.num_reads == 1)
    job_id = await only_job(api)
    post.cancel()
    job = await until_state(api, job_id, "cancelled")
    assert job["error"]["code"] == "cancelled"
    await until(lambda: api.readers.num_cancelled == 1)


@pytest.mark.parametrize("stream", [True, False])
async def test_closing_while_queued_cancels_the_job(
    api: RunningApi, worker: ScriptedWorker, stream: bool
) -> None:
    post = asyncio.create_task(api.post(stream=stream))
    await until(lambda: api.readers.num_reads == 1)
    job_id = await only_job(api)
    await until_state(api, job_id, "queued")
    post.cancel()
    await until_state(api, job_id, "cancelled")


@pytest.mark.parametrize("stream", [True, False])
async def test_closing_while_running_cancels_the_job(
    api: RunningApi, worker: ScriptedWorker, stream: bool
) -> None:
    post = asyncio.create_task(api.post(stream=stream))
    delivery = await worker.take()
    assert await worker.say(delivery, 0)
    post.cancel()
    await until_state(api, delivery.job_id, "cancelled")
    assert not await worker.say(delivery, 1)
    metrics = await api.metrics()
    assert "dycoke_client_disconnects_total 1.0" in metrics


async def test_resetting_the_connection_cancels_the_job(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    """A client that dies sends a reset, not an orderly close."""
    upload = await api.client.post("/v1/videos", files={"video": CLIP})
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    body = f'{{"question": "x", "video_id": "{upload.json()["video_id"]}"}}'.encode()
    writer.write(
        b"POST /v1/video/chat HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(body) + body
    )
    await reader.readuntil(b"event: job")
    delivery = await worker.take()
    writer.transport.abort()
    await until_state(api, delivery.job_id, "cancelled")


@pytest.mark.parametrize("stream", [True, False])
async def test_job_goes_on_without_its_client_if_asked_to(
    api: RunningApi, worker: ScriptedWorker, stream: bool
) -> None:
    api.readers.may_read.clear()
    post = asyncio.create_task(api.post(stream=stream, on_disconnect="continue"))
    await until(lambda: api.readers.num_reads == 1)
    job_id = await only_job(api)
    post.cancel()
    await asyncio.sleep(0.3)
    api.readers.may_read.set()
    await worker.answer(3)
    job = await until_state(api, job_id, "done")
    assert job["result"]["text"] == "t0 t1 t2 "

    async def is_observed() -> bool:
        labels = 'model="tiny",outcome="done",policy="dycoke",requested="fixed"'
        return f"dycoke_requests_total{{{labels}}} 1.0" in await api.metrics()

    async with asyncio.timeout(10):
        while not await is_observed():
            await asyncio.sleep(0.05)


async def test_cancel_by_disconnect_waits_for_redis(
    own_redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> None:
    async with (
        running_api(own_redis_server.url, keys, tmp_path) as api,
        scripted_worker(own_redis_server.url, keys) as worker,
    ):
        post = asyncio.create_task(api.post())
        delivery = await worker.take()
        own_redis_server.stop()
        post.cancel()
        await asyncio.sleep(0.5)
        own_redis_server.start()

        async def state() -> str:
            try:
                return str((await api.api.jobs.queue.get(delivery.job_id)).state)
            except StoreUnavailableError:
                return "unknown"

        async with asyncio.timeout(20):
            while await state() != "cancelled":
                await asyncio.sleep(0.1)


def incoming(api: RunningApi) -> list[Path]:
    return list((api.settings.data_dir / "videos" / "incoming").iterdir())
