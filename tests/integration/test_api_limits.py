"""What the API refuses, and how: full queue, large bodies, connections that send nothing."""

import asyncio
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from app.api.connection import bodies, http_protocol
from app.store.keys import RedisKeys
from tests.integration.api import (
    CLIP,
    EventReader,
    RunningApi,
    ScriptedWorker,
    parse_events,
    raw_request,
    running_api,
    until,
)
from tests.integration.conftest import RedisServer
from tests.integration.openai_client import about

MAX_UPLOAD_BYTES = 2**20


@pytest.fixture
async def api(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> AsyncIterator[RunningApi]:
    async with running_api(
        redis_server.url,
        keys,
        tmp_path,
        max_queued_jobs=1,
        max_streams=3,
        max_upload_bytes=MAX_UPLOAD_BYTES,
    ) as api:
        yield api


def upload_head(length: int) -> str:
    return (
        "POST /v1/video/chat HTTP/1.1\nhost: localhost\n"
        f"content-type: multipart/form-data; boundary=b\ncontent-length: {length}\n"
    )


# --- connections ---


async def test_connection_that_never_sends_its_headers_is_closed(
    api: RunningApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEADERS_TIMEOUT_S", 0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
    writer.write(b"GET /livez HTTP/1.1\r\nx-half:")  # the second request stops half-way
    async with asyncio.timeout(10):
        await reader.read()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    "head",
    [
        "GET /livez HTTP/1.1\r\nhost: x\r\nx-long: ",
        "GET /livez HTTP/1.1\r\nhost: x\r\n" + 2000 * f"x-many: {'y' * 60}\r\n",
        "GET /",
        "POST /v1/videos HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n"
        + 2000 * f"x-many: {'y' * 60}\r\n",
    ],
    ids=["one", "many", "path", "trailers"],
)
async def test_headers_without_end_are_refused(
    api: RunningApi, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEADERS_TIMEOUT_S", 600)  # it is the size that ends it
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(head.encode())
    answered = asyncio.create_task(reader.read())
    with suppress(ConnectionError):  # it may close before it has read all this
        for _ in range(200):
            writer.write(b"z" * 4096)
            await writer.drain()
            await asyncio.sleep(0)
    async with asyncio.timeout(20):
        with suppress(ConnectionError):
            assert b" 200 " not in await answered
    writer.close()


# --- over budget ---


async def test_full_queue_refuses_before_the_body_is_sent(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    api.readers.may_read.clear()
    async with api.posting() as first:
        reader = EventReader(first)
        await reader.until("status", stage="reading_frames")
        client, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(upload_head(10**12).replace("\n", "\r\n").encode() + b"\r\n")
        async with asyncio.timeout(5):
            head = await client.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 429 ")
        assert re.search(rb"retry-after: [1-9]", head)
        writer.close()
        response = await api.post()
        assert response.status_code == 429
        assert response.json()["code"] == "queue_full"
        assert response.json()["retryable"] is True
        api.readers.may_read.set()
        await worker.answer()
        await reader.until("done")
    post = asyncio.create_task(api.post(stream=False))
    await worker.answer()
    assert (await post).status_code == 200
    assert 'rejections_total{reason="queue_full"} 2.0' in await api.metrics()


async def test_a_large_job_takes_several_places(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with running_api(redis_server.url, keys, tmp_path, max_queued_jobs=3) as api:
        api.readers.may_read.clear()
        async with api.posting(num_frames=128) as large:
            await EventReader(large).until("status", stage="reading_frames")
            assert (await api.post()).json()["code"] == "queue_full"


async def test_whoever_is_still_sending_holds_no_place(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    """There is one place in all."""
    _reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(upload_head(1000).replace("\n", "\r\n").encode() + b"\r\n--b")
    await until(lambda: len(api.api.streams.taken) == 1)
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0
    post = asyncio.create_task(api.post(stream=False))
    await worker.answer()
    assert (await post).status_code == 200
    writer.close()


async def post_form(api: RunningApi, clip: bytes) -> tuple[int, dict[str, Any]]:
    reply = await api.post(clip=clip, stream=False)
    return reply.status_code, reply.json()


async def post_data_url(api: RunningApi, clip: bytes) -> tuple[int, dict[str, Any]]:
    url = f"data:video/mp4;base64,{b64encode(clip).decode()}"
    reply = await api.client.post("/v1/chat/completions", json={"messages": about(url)})
    return reply.status_code, reply.json()["error"]


@pytest.mark.parametrize("post", [post_form, post_data_url])
async def test_queue_that_fills_while_a_video_comes_in_spares_the_next_upload(
    post: Callable[[RunningApi, bytes], Coroutine[Any, Any, tuple[int, dict[str, Any]]]],
    api: RunningApi,
    worker: ScriptedWorker,
) -> None:
    known = (await api.client.post("/v1/videos", files={"video": CLIP})).json()["video_id"]
    api.readers.may_probe.clear()
    late = asyncio.create_task(post(api, CLIP + b"late"))
    await until(lambda: api.readers.num_probes == 2)
    first = asyncio.create_task(api.post(clip=None, video_id=known, stream=False))
    delivery = await worker.take()  # it has left the queue; the next one stays in it
    second = asyncio.create_task(api.post(clip=None, video_id=known, stream=False))
    async with asyncio.timeout(20):
        while (await api.api.jobs.queue.depth("tiny")).queued == 0:
            await asyncio.sleep(0.01)
    api.readers.may_probe.set()
    status, refusal = await late
    assert (status, refusal["code"]) == (429, "queue_full")
    video_id = refusal["video_id"]
    await worker.finish(delivery, 0)
    await worker.answer()
    assert [(await asked).status_code for asked in (first, second)] == [200, 200]
    retry = asyncio.create_task(api.post(clip=None, video_id=video_id, stream=False))
    await worker.answer()
    assert (await retry).status_code == 200
    assert api.readers.num_probes == 2, "nothing was uploaded again"


async def test_refusal_reaches_a_client_that_is_still_sending(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    await worker.withdraw()
    response = await api.post(clip=CLIP + bytes(MAX_UPLOAD_BYTES // 2))
    assert response.status_code == 503
    assert response.json()["code"] == "no_worker"
    assert response.headers["retry-after"].isdecimal()


async def test_announced_length_over_the_cap_is_a_413_before_the_body(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    async with asyncio.timeout(10):
        reply = await raw_request(api.port, upload_head(10**10))
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert b'"upload_too_large"' in reply
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0


async def test_unannounced_length_over_the_cap_is_a_413_when_it_is_passed(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    num_sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal num_sent
        yield b'--b\r\ncontent-disposition: form-data; name="video"\r\n\r\n' + CLIP
        for _ in range(4 * MAX_UPLOAD_BYTES // 65536):
            num_sent += 65536
            yield bytes(65536)

    response = await api.client.post(
        "/v1/video/chat",
        content=body(),
        headers={"content-type": "multipart/form-data; boundary=b"},
    )
    assert response.status_code == 413
    assert response.json()["code"] == "upload_too_large"
    await until(lambda: not list((api.settings.data_dir / "videos").rglob("?" * 32)))
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0


async def test_large_json_body_is_a_413(api: RunningApi, worker: ScriptedWorker) -> None:
    response = await api.client.post(
        "/v1/video/chat",
        content=b'{"question": "' + bytes(2 * 2**20) + b'"}',
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 413


async def test_text_that_can_never_fit_the_model_is_refused_before_it_is_stored(
    api: RunningApi, worker: ScriptedWorker, redis: Redis, keys: RedisKeys
) -> None:
    """The worker's card says 4,096 tokens."""
    turns = [{"role": "user", "content": "x" * 32_768}] * 2
    response = await api.post(question=None, messages=[*turns, {"role": "user", "content": "x"}])
    assert response.status_code == 400
    assert response.json()["code"] == "prompt_too_long"
    assert await redis.keys(keys.job("*")) == []
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0
    post = asyncio.create_task(api.post(question=None, messages=turns))
    await worker.answer()
    assert (await post).status_code == 200, "what just might fit is the worker's to judge"


async def test_frames_that_can_never_fit_the_model_are_refused_before_they_are_read(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    """By the worker's card a frame takes 4 of 4,096 tokens."""
    response = await api.post(num_frames=100, max_tokens=3700, compression="full")
    assert (response.status_code, response.json()["code"]) == (400, "prompt_too_long")
    assert api.readers.num_reads == 0
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0
    post = asyncio.create_task(api.post(num_frames=100, max_tokens=3690, compression="full"))
    await worker.answer()
    assert (await post).status_code == 200


async def test_client_that_stops_sending_is_told_and_frees_its_place(
    api: RunningApi, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "IDLE_S", 0.3)
    monkeypatch.setattr(bodies, "FIRST_BYTE_S", 0.3)
    reply = await raw_request(api.port, upload_head(1000), b"--b\r\n")
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert b'"upload_timeout"' in reply
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0


async def test_client_that_drips_is_told_and_frees_its_place(
    api: RunningApi, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "IDLE_S", 0.5)
    monkeypatch.setattr(bodies, "FIRST_BYTE_S", 0.5)
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    part = '--b\nContent-Disposition: form-data; name="question"\n\n'
    writer.write(f"{upload_head(1000)}\n{part}".replace("\n", "\r\n").encode())

    async def drip() -> None:
        while True:
            writer.write(b"?")
            await asyncio.sleep(0.05)

    dripping = asyncio.create_task(drip())
    try:
        async with asyncio.timeout(10):
            reply = await reader.readuntil(b"upload_timeout")
    finally:
        dripping.cancel()
        writer.close()
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0


async def test_clients_that_send_headers_alone_hold_nothing_of_the_others(
    redis_server: RedisServer,
    keys: RedisKeys,
    tmp_path: Path,
    worker: ScriptedWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bodies, "FIRST_BYTE_S", 2.0)
    settings = {"max_uploads": 6, "max_uploads_per_client": 4, "trusted_proxies": "127.0.0.1"}
    async with running_api(redis_server.url, keys, tmp_path, **settings) as api:

        async def send_headers(address: str) -> asyncio.StreamReader:
            reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
            head = f"{upload_head(1000)}x-forwarded-for: {address}\n\n"
            writer.write(head.replace("\n", "\r\n").encode())
            writers.append(writer)
            return reader

        writers: list[asyncio.StreamWriter] = []
        held = [await send_headers("203.0.113.7") for _ in range(4)]
        refused = await (await send_headers("203.0.113.7")).readuntil(b"too_many_uploads")
        assert refused.startswith(b"HTTP/1.1 429 ") and b"retry-after" in refused.lower()
        post = asyncio.create_task(api.post(stream=False))
        await worker.answer()
        assert (await post).status_code == 200, "another address has its own"
        async with asyncio.timeout(20):
            replies = [await reader.readuntil(b"upload_timeout") for reader in held]
        assert all(reply.startswith(b"HTTP/1.1 408 ") for reply in replies)
        for writer in writers:
            writer.close()
        assert 'rejections_total{reason="too_many_uploads"} 1.0' in await api.metrics()


async def test_address_is_what_a_trusted_proxy_says_and_nobody_else(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with running_api(
        redis_server.url, keys, tmp_path, max_uploads=6, max_uploads_per_client=1
    ) as api:
        _reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(upload_head(1000).replace("\n", "\r\n").encode() + b"\r\n--b")
        async with asyncio.timeout(20):
            while (await api.post(clip=None, video_id="vid_x")).status_code != 429:
                await asyncio.sleep(0.02)
        spoofed = {"X-Forwarded-For": "198.51.100.1"}
        assert (await api.post(clip=None, video_id="vid_x", headers=spoofed)).status_code == 429
        writer.close()
        async with asyncio.timeout(20):
            while (await api.post(clip=None, video_id="vid_x")).status_code == 429:
                await asyncio.sleep(0.02)


async def test_what_a_request_leaves_out_is_never_more_than_the_server_takes(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    settings = {"max_frames": 2, "max_tokens": 3}
    async with running_api(redis_server.url, keys, tmp_path, **settings) as api:
        video_id = (await api.client.post("/v1/videos", files={"video": CLIP})).json()["video_id"]
        for path, body in (
            ("/v1/video/chat", {"question": "?", "video_id": video_id}),
            ("/v1/chat/completions", {"messages": about(video_id)}),
        ):
            post = asyncio.create_task(api.client.post(path, json=body))
            asked = (await worker.answer()).request
            assert (await post).status_code == 200
            assert asked.max_tokens == 3 and asked.frames is not None
            assert asked.frames.num_frames == 2


async def test_open_answers_are_bounded(api: RunningApi, worker: ScriptedWorker) -> None:
    async with api.posting() as first:
        url = f"/v1/jobs/{first.headers['x-job-id']}/events"
        async with api.client.stream("GET", url), api.client.stream("GET", url):
            refused = await api.client.get(url)
            assert refused.status_code == 503
            assert refused.json()["code"] == "too_many_streams"
            assert "retry-after" in refused.headers
            assert "dycoke_open_streams 3.0" in await api.metrics()
        async with asyncio.timeout(10):
            while (await api.client.head(url)).status_code != 405:
                await asyncio.sleep(0.05)
        again = asyncio.create_task(api.client.get(url))
        await worker.answer()
        assert parse_events((await again).text)[-1].name == "done"
