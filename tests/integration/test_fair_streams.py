"""Open answers are shared between keys, and requests that are still coming in hold none."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

from starlette.requests import Request

from app.store.keys import RedisKeys
from tests.integration.api import CLIP, RunningApi, ScriptedWorker, running_api, until
from tests.integration.api_keys import KEYS, A, B
from tests.integration.conftest import RedisServer

MAX_STREAMS = 4


async def upload(api: RunningApi, who: dict[str, str]) -> str:
    reply = await api.client.post("/v1/videos", files={"video": CLIP}, headers=who)
    video_id: str = reply.json()["video_id"]
    return video_id


async def answer(api: RunningApi, worker: ScriptedWorker, video_id: str) -> None:
    """B asks, and is answered."""
    ask = api.post(clip=None, stream=False, video_id=video_id, headers=B)
    post = asyncio.create_task(ask)
    await asyncio.wait([post, taking := asyncio.create_task(worker.answer())], timeout=20)
    taking.cancel()
    assert (await post).status_code == 200, (await post).text


async def test_readers_of_one_keys_events_keep_no_other_key_out(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with (
        running_api(
            redis_server.url, keys, tmp_path, api_keys=KEYS, max_streams=MAX_STREAMS
        ) as api,
        AsyncExitStack() as stack,
    ):
        mine, others = [await upload(api, who) for who in (A, B)]
        first = await stack.enter_async_context(api.posting(clip=None, video_id=mine, headers=A))
        await worker.take()
        frame = f"/v1/videos/{mine}/frames/0?job_id={first.headers['x-job-id']}"
        assert (await api.client.get(frame, headers=A)).status_code == 200
        url = f"/v1/jobs/{first.headers['x-job-id']}/events"
        for _ in range(MAX_STREAMS - 1):
            await stack.enter_async_context(api.client.stream("GET", url, headers=A))
        for refused in (
            await api.client.get(url, headers=A),
            await api.post(clip=None, video_id=mine, headers=A),
            await api.client.get(f"/v1/videos/{mine}/content", headers=A),
            await api.client.get(frame, headers=A),
        ):
            assert (refused.status_code, refused.json()["code"]) == (503, "too_many_streams")
        await answer(api, worker, others)


def completion() -> bytes:
    """A chat completion's body with a clip in it."""
    url = f"data:video/mp4;base64,{base64.b64encode(CLIP).decode()}"
    content = [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "text", "text": "What?"},
    ]
    return json.dumps({"messages": [{"role": "user", "content": content}]}).encode()


async def test_video_that_has_come_is_kept_where_there_is_no_room_for_its_answer(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with (
        running_api(redis_server.url, keys, tmp_path, api_keys=KEYS, max_streams=1) as api,
        AsyncExitStack() as stack,
    ):
        streams, may_end = api.api.streams, asyncio.Event()

        async def parts(body: bytes, end: bytes) -> AsyncIterator[bytes]:
            yield body
            await may_end.wait()
            yield end

        file = b'Content-Disposition: form-data; name="video"; filename="v"\r\n\r\n' + CLIP
        question = b'Content-Disposition: form-data; name="question"\r\n\r\nWhat?\r\n--b\r\n'
        form = "multipart/form-data; boundary=b"
        posts = [
            asyncio.create_task(
                api.client.post(path, content=parts(body, end), headers={**A, "Content-Type": kind})
            )
            for path, kind, body, end in (
                ("/v1/video/chat", form, b"--b\r\n" + question + file, b"\r\n--b--\r\n"),
                ("/v1/videos", form, b"--b\r\n" + file, b"\r\n--b--\r\n"),
                ("/v1/chat/completions", "application/json", completion()[:-1], b"}"),
            )
        ]
        await until(lambda: len(streams.taken) == 3)
        no_body = Request({"type": "http", "headers": [], "client": None})
        others = [streams.take(no_body, owner) for owner in ("a third", "a fourth")]
        may_end.set()
        refused, stored, completion_refused = await asyncio.gather(*posts)
        assert stored.status_code == 201
        error = completion_refused.json()["error"]
        for reply, problem in ((refused, refused.json()), (completion_refused, error)):
            assert (reply.status_code, problem["code"]) == (503, "too_many_streams")
            assert "retry-after" in reply.headers
            assert problem["video_id"] == stored.json()["video_id"]
        assert streams.num_open == 2
        for other in others:
            other.release()
        again = api.posting(clip=None, video_id=refused.json()["video_id"], headers=A)
        assert (await stack.enter_async_context(again)).status_code == 200


async def test_requests_that_are_coming_in_hold_no_stream(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with running_api(redis_server.url, keys, tmp_path, api_keys=KEYS, max_streams=1) as api:
        video_id = await upload(api, B)
        writers = []
        for path in ("/v1/video/chat", "/v1/chat/completions", "/v1/videos"):
            kind = "multipart/form-data; boundary=b" if "videos" in path else "application/json"
            _reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
            head = (
                f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\n"
                f"authorization: {A['Authorization']}\r\ncontent-length: 100\r\n\r\n-"
            )
            writer.write(head.encode())
            writers.append(writer)
        await until(lambda: len(api.api.streams.taken) == 3)
        await answer(api, worker, video_id)
        for writer in writers:
            writer.close()
