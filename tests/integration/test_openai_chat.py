"""Chat completions: the real OpenAI client, and what other clients parse, against a real server."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from app.store.keys import RedisKeys
from tests.integration.api import (
    MODEL,
    RunningApi,
    ScriptedWorker,
    running_api,
)
from tests.integration.conftest import RedisServer
from tests.integration.openai_client import PATH, about, upload

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
        (
            {"fps": 1, "max_pixels": 10**4},
            {"media_io_kwargs": {"video": {"num_frames": 8, "max_pixels": 10**5}}},
            10,
            [
                "num_frames 8: the video's part says how many frames",
                "max_pixels 100000: the video's part",
                "max_pixels 10000: all of the model's frames have one size",
            ],
        ),
        (
            {},
            {"mm_processor_kwargs": {"fps": 2}, "media_io_kwargs": {"video": {"fps": 1}}},
            10,
            ["mm_processor_kwargs.fps: media_io_kwargs.video.fps is taken"],
        ),
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
