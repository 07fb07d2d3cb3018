"""Chat completions: the real OpenAI client, and what other clients parse, against a real server."""

import asyncio
import base64
import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from app.store.keys import RedisKeys
from dycoke_core.errors import UnreadableVideoError
from tests.integration.api import (
    CLIP,
    MODEL,
    RunningApi,
    ScriptedWorker,
    raw_request,
    running_api,
    until,
    until_state,
)
from tests.integration.conftest import RedisServer
from tests.integration.openai_client import PATH, about, client_of, upload

KEYS = "k" * 40


# --- answers ---


async def test_a_whole_answer_has_what_clients_read(
    api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI
) -> None:
    video_id = await upload(api)
    answering = asyncio.create_task(worker.answer(3))
    answer = await client.chat.completions.create(model=MODEL, messages=about(video_id))
    delivery = await answering
    assert answer.id == f"chatcmpl-{delivery.job_id}" == f"chatcmpl-{answer._request_id}"
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "t0 t1 t2 ")
    assert choice.finish_reason == "stop"
    assert answer.usage is not None and answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 20,
        "completion_tokens": 3,
        "total_tokens": 23,
        "prompt_tokens_details": {"cached_tokens": 5, "multimodal_tokens": {"video": 16}},
    }
    receipt = answer.model_extra["dycoke"]  # type: ignore[index]
    assert receipt["job_id"] == delivery.job_id and receipt["video_id"] == video_id
    assert len(receipt["frames"]["timestamps_s"]) == 32 and receipt["warnings"] == []


async def test_a_stream_has_one_chunk_for_each_token(
    api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI
) -> None:
    answering = asyncio.create_task(worker.answer(3))
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=about(await upload(api)),
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    await answering
    *tokens, usage = chunks
    assert [t.choices[0].delta.content for t in tokens if t.choices[0].delta.content] == [
        "t0 ",
        "t1 ",
        "t2 ",
    ]
    assert [t.choices[0].delta.role for t in tokens[:2]] == ["assistant", None]
    assert [t.choices[0].finish_reason for t in tokens][-1] == "stop"
    assert usage.choices == [] and usage.usage is not None
    assert usage.usage.completion_tokens == 3
    assert usage.model_extra["dycoke"]["usage"]["visual_tokens"] == 16  # type: ignore[index]
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_stream_is_bare_data_lines_and_blank_heartbeats(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with running_api(redis_server.url, keys, tmp_path, heartbeat_s=0.05) as api:
        body = {"messages": about(await upload(api)), "stream": True}
        async with api.client.stream("POST", PATH, json=body) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            parts = response.aiter_bytes()
            assert (await anext(parts)).strip() == b""  # silence so far
            await worker.answer(2)
            text = b"".join([part async for part in parts]).decode()
    lines = text.splitlines()
    assert all(line == "" or line.startswith("data: ") for line in lines)
    *chunks, last = [line.removeprefix("data: ") for line in lines if line]
    assert last == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert "usage" not in parsed[0]
    assert parsed[-1]["choices"][0]["finish_reason"] == "stop"
    assert parsed[-1]["dycoke"]["model"] == MODEL  # without a usage chunk, on the last one


async def test_text_alone_is_answered_without_a_video(
    api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI
) -> None:
    answering = asyncio.create_task(worker.answer(2))
    turns: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": [{"type": "text", "text": "One,"}, "two?"]},
    ]
    answer = await client.chat.completions.create(
        model=MODEL, messages=turns, extra_body={"compression": "dycoke"}
    )
    request = (await answering).request
    assert (request.video_id, request.frames, request.video_turn) == (None, None, None)
    assert [(t.role, t.content) for t in request.messages] == [
        ("system", "Be brief."),
        ("user", "Hello"),
        ("assistant", "Hello."),
        ("user", "One,\ntwo?"),
    ]
    receipt = answer.model_extra["dycoke"]  # type: ignore[index]
    assert receipt["video_id"] is receipt["frames"] is receipt["cache"] is None
    assert receipt["compression"]["retained_ratio"] is None
    assert receipt["compression"]["policy"] == "full" and "compression" in receipt["warnings"][0]
    job = (await api.client.get(f"/v1/jobs/{request.job_id}")).json()
    assert job["state"] == "done" and job["video_id"] is None
    metrics = (await api.client.get("/metrics")).text
    labels = 'outcome="done",policy="none",requested="fixed"'
    assert re.search(rf"dycoke_requests_total\{{[^}}]*{labels}\}} 1\.0", metrics)
    assert "dycoke_retained_token_ratio_count" not in metrics


async def test_text_alone_goes_on_when_its_api_is_gone(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    """Between its record and the queue: another API finds it, and there is nothing to read."""
    async with running_api(redis_server.url, keys, tmp_path) as api:
        body = {"messages": [{"role": "user", "content": "Hello"}], "n": 1}
        async with api.client.stream("POST", PATH, json={**body, "stream": True}) as response:
            job_id = response.headers["x-job-id"]
            delivery = await worker.take()
            assert delivery.job_id == job_id
    queued = delivery.request.model_copy(update={"job_id": "job_orphan"})
    async with running_api(redis_server.url, keys, tmp_path, lease_s=0.2) as api:
        queue = api.api.jobs.queue
        await queue.reserve(MODEL, "job_orphan", max_jobs=9, lease_s=0.0)
        await queue.create(queued)
        delivery = await worker.take()
        assert delivery.job_id == "job_orphan"


async def test_the_video_may_be_in_any_user_turn(
    api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI
) -> None:
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello."},
        *about(await upload(api)),
    ]
    answering = asyncio.create_task(worker.answer(1))
    await client.chat.completions.create(model=MODEL, messages=turns)
    assert (await answering).request.video_turn == 2


async def test_what_is_honoured_reaches_the_job(
    api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI
) -> None:
    answering = asyncio.create_task(worker.answer(1))
    await client.chat.completions.create(
        model=MODEL,
        messages=about(await upload(api), start_s=1, end_s=5.5, fps=2),
        max_tokens=9,
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=11,
        stop=["\n", "END"],
        n=1,
        user="somebody",
        store=False,
        presence_penalty=0,
        extra_body={
            "ignore_eos": True,
            "compression": {"policy": "dycoke", "k": 0.5},
            "on_disconnect": "continue",
        },
    )
    request = (await answering).request
    assert (request.max_tokens, request.temperature, request.top_p) == (7, 0.5, 0.9)
    assert (request.seed, request.stop, request.ignore_eos) == (11, ["\n", "END"], True)
    assert request.compression["k"] == 0.5 and request.warnings == []
    wanted = request.frames_wanted
    assert wanted is not None
    assert (wanted.num_frames, wanted.start_s, wanted.end_s) == (9, 1, 5.5)


@pytest.mark.parametrize(
    ("part", "body", "num_frames", "warnings"),
    [
        ({"num_frames": 5}, {}, 5, []),
        ({"fps": 1, "max_frames": 4}, {}, 4, ["fps 1: 10 frames wanted, 4 are the most"]),
        ({"fps": 60}, {}, 128, ["fps 60: the video has 25", "250 frames wanted, 128"]),
        ({}, {"media_io_kwargs": {"video": {"num_frames": 8}}}, 8, []),
        ({"fps": 1}, {"media_io_kwargs": {"video": {"num_frames": 8}}}, 10, []),
        ({}, {"media_io_kwargs": {"video": {"num_frames": 999}}}, 128, ["128 are the most"]),
        ({}, {"mm_processor_kwargs": {"fps": 0.5, "do_sample_frames": True}}, 5, []),
        ({}, {"mm_processor_kwargs": {"fps": 1e300}}, 32, ["fps: not honoured"]),
        ({}, {"mm_processor_kwargs": {"do_sample_frames": False}}, 32, ["always sampled"]),
        ({"max_tokens_per_frame": 9}, {"top_k": 3}, 32, ["top_k", "max_tokens_per_frame"]),
    ],
)
async def test_frames_are_counted_and_what_is_not_honoured_is_said(
    part: dict[str, Any],
    body: dict[str, Any],
    num_frames: int,
    warnings: list[str],
    api: RunningApi,
    worker: ScriptedWorker,
) -> None:
    messages = about(await upload(api), **part)
    answering = asyncio.create_task(worker.answer(1))
    response = await api.client.post(PATH, json={"messages": messages, **body})
    assert response.status_code == 200, response.text
    wanted = (await answering).request.frames_wanted
    assert wanted is not None and wanted.num_frames == num_frames
    said = response.json()["dycoke"]["warnings"]
    assert len(said) == len(warnings)
    assert all(expected in actual for expected, actual in zip(warnings, said, strict=True))


@pytest.mark.parametrize(
    "form",
    [
        lambda video_id: {"video_url": video_id},
        lambda video_id: {"type": "video_url", "video_url": {"url": video_id}, "uuid": "u"},
        lambda video_id: {"type": "video", "video": video_id, "fps": 1},
        lambda video_id: {"type": "file", "file": {"file_id": video_id}},
    ],
)
async def test_a_video_may_be_named_in_every_clients_way(
    form: Any, api: RunningApi, worker: ScriptedWorker
) -> None:
    video_id = await upload(api)
    content = [form(video_id), {"type": "text", "text": "What happens?"}]
    answering = asyncio.create_task(worker.answer(1))
    body = {"messages": [{"role": "user", "content": content}]}
    response = await api.client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    assert (await answering).request.video_id == video_id


# --- refusals ---


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"priority": "urgent"}, "priority"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": 601}, "deadline_s"),
        ({"priority": 1}, "priority"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"chat_template": "{{ evil }}"}, "chat_template"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"prompt_embeds": "x"}, "prompt_embeds"),
        ({"guided_regex": "(a+)+"}, "guided_regex"),
        ({"logits_processors": ["os.system"]}, "logits_processors"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"compression": "zip"}, "compression"),
        ({"model": "gpt-5"}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0",
        ),
        ({"messages": about("ftp://x")}, "messages.0.content.1.video_url.url"),
        ({"messages": about("vid_x", fps=-1)}, "messages.0.content.1.video_url.fps"),
        (
            {"messages": about("vid_x", num_frames=True)},
            "messages.0.content.1.video_url.num_frames",
        ),
        (
            {"messages": [{"role": "system", "content": about("vid_x")[0]["content"]}]},
            "messages.0.content.1.video_url.url",
        ),
        (
            {"messages": [{"role": "user", "content": about("vid_x")[0]["content"] * 2}]},
            "messages.0.content.3",
        ),
    ],
)
async def test_what_is_wrong_is_named(
    fields: dict[str, Any], param: str, api: RunningApi, worker: ScriptedWorker
) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], **fields}
    response = await api.client.post(PATH, json=body)
    assert response.status_code in (400, 404), response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-should-retry"] == "false"
    error = response.json()["error"]
    assert error["param"] == param, error
    assert error["code"] in ("invalid_request", "model_not_found") and error["message"]


async def test_errors_are_openais_own_classes(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    hello: list[Any] = [{"role": "user", "content": "Hello"}]
    settings = {"api_keys": f"somebody:{KEYS}", "max_queued_jobs": 1}
    async with running_api(redis_server.url, keys, tmp_path, **settings) as api:
        async with client_of(api) as stranger:
            with pytest.raises(openai.AuthenticationError) as unauthorized:
                await stranger.chat.completions.create(model=MODEL, messages=hello)
        assert unauthorized.value.code == "unauthorized"
    async with (
        running_api(redis_server.url, keys, tmp_path, **settings) as api,
        client_of(api, api_key=KEYS) as client,
    ):
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(model=MODEL, messages=about("vid_" + "0" * 64))
        assert unknown.value.code == "video_not_found"
        with pytest.raises(openai.NotFoundError) as no_route:
            await client.get("/chat/completions/nothing", cast_to=object)
        assert no_route.value.code == "not_found"
        stream = await client.chat.completions.create(model=MODEL, messages=hello, stream=True)
        with pytest.raises(openai.RateLimitError) as full:
            await client.chat.completions.create(model=MODEL, messages=hello)
        assert full.value.code == "queue_full" and full.value.type == "rate_limit_error"
        assert int(full.value.response.headers["retry-after"]) >= 1
        await worker.answer(1)
        assert [chunk async for chunk in stream]


async def test_an_unexpected_error_is_openais_too(
    api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("a bug, with a secret")

    monkeypatch.setattr("app.api.openai.intake.parse_messages", fail)
    with pytest.raises(openai.InternalServerError) as error:
        await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hello"}]
        )
    assert error.value.code == "internal_error" and "secret" not in str(error.value)
    assert error.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_failure_after_the_headers_reaches_the_client(
    is_streamed: bool, api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI
) -> None:
    api.readers.read_error = UnreadableVideoError("no frame of it decodes")
    messages = about(await upload(api))
    with pytest.raises(openai.APIError) as error:
        answer = await client.chat.completions.create(
            model=MODEL, messages=messages, stream=is_streamed
        )
        async with answer:  # type: ignore[union-attr]
            _ = [chunk async for chunk in answer]  # type: ignore[union-attr]
    assert error.value.code == "unreadable_video"


# --- connections ---


async def test_closing_the_stream_cancels_the_job(
    api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI
) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=about(await upload(api)), stream=True
    )
    delivery = await worker.take()
    await worker.say(delivery, 0)
    await anext(aiter(stream))
    await stream.close()
    await until_state(api, delivery.job_id, "cancelled")
    assert not await worker.say(delivery, 1)


async def test_an_idempotency_key_finds_the_first_job(
    api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI
) -> None:
    answering = asyncio.create_task(worker.answer(2))
    again = {
        "model": MODEL,
        "messages": about(await upload(api)),
        "extra_headers": {"Idempotency-Key": "once"},
    }
    first = await client.chat.completions.create(**again)
    await answering
    second = await client.chat.completions.create(**again)
    assert first.id == second.id
    with pytest.raises(openai.ConflictError) as conflict:
        await client.chat.completions.create(**again, extra_body={"ignore_eos": True})
    assert conflict.value.code == "idempotency_conflict"


async def test_a_shutdown_does_not_look_like_an_end(
    api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI
) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=about(await upload(api)), stream=True
    )
    delivery = await worker.take()
    await worker.say(delivery, 0)
    chunks = aiter(stream)
    await anext(chunks)
    api.server.begin_drain()
    await until(lambda: api.api.drain.is_draining)
    api.server.begin_drain()  # at once
    with pytest.raises(openai.APIError) as error:
        await anext(chunks)
    await stream.close()
    assert error.value.code == "shutting_down"


# --- videos in the body ---


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
