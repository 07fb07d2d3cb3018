"""Streams of chat completions: in any packets, two hundred at a time, and once their clients
leave."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from app.settings import Settings
from app.store.keys import RedisKeys
from tests.integration.api import (
    MODEL,
    PATIENCE_S,
    RunningApi,
    ScriptedWorker,
    parse_events,
    running_api,
    until_state,
)
from tests.integration.benchmark_client import measure
from tests.integration.conftest import RedisServer
from tests.integration.fake_engine import answer, text_of
from tests.integration.openai_client import PATH, about, hello, upload
from tests.integration.workers import WorkerProcess

NUM_STREAMS = 200
NUM_TOKENS = 24


# --- packets ---


async def writes_of_a_stream(api: RunningApi, worker: ScriptedWorker) -> list[bytes]:
    """What the server writes, piece by piece, with a heartbeat before each token and the end."""
    body = {"messages": hello(), "stream": True, "stream_options": {"include_usage": True}}
    writes: list[bytes] = []
    async with api.client.stream("POST", PATH, json=body) as response:
        pieces = response.aiter_raw()

        async def read_until(is_reached: Callable[[bytes], bool]) -> None:
            while not (writes and writes[-1].endswith(b"\n") and is_reached(writes[-1])):
                writes.append(await anext(pieces))

        delivery = await worker.take()
        for index in range(3):
            await read_until(lambda piece: not piece.strip())
            await worker.say(delivery, index)
            await read_until(lambda piece: b'"content"' in piece)
        await read_until(lambda piece: not piece.strip())
        await worker.finish(delivery, 3)
        return writes + [piece async for piece in pieces]


def packings(writes: list[bytes]) -> list[list[bytes]]:
    """Every way in which packets may hold these writes."""
    places = range(1, len(writes))
    cuts = [c for number in range(len(writes)) for c in combinations(places, number)]
    return [
        [b"".join(writes[a:b]) for a, b in zip((0, *cut), (*cut, len(writes)), strict=True)]
        for cut in cuts
    ]


async def test_benchmarks_read_a_stream_in_whatever_packets_it_comes(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with running_api(redis_server.url, keys, tmp_path, heartbeat_s=0.02) as api:
        writes = await writes_of_a_stream(api, worker)
    # A heartbeat again and again says nothing new.
    writes = [w for before, w in zip([b"", *writes], writes, strict=False) if w != before]
    assert sum(not piece.strip() for piece in writes) >= 4 and len(writes) <= 12
    for packets in packings(writes):
        measured = measure(packets)
        assert measured.text == "t0 t1 t2 ", packets
        assert measured.usage["completion_tokens"] == 3, packets
        assert measured.num_timed <= 4  # the end may come without a token


# --- many ---


@pytest.fixture
async def busy_api(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> AsyncIterator[RunningApi]:
    """With a worker whose engine has no model, in a process of its own."""
    limits = {"max_queued_jobs": 300, "max_uploads": 300, "max_uploads_per_client": 300}
    settings = Settings(
        redis_url=redis_server.url, redis_prefix=keys.prefix, model=MODEL, max_running_jobs=64
    )
    async with running_api(redis_server.url, keys, tmp_path, **limits) as api:
        with WorkerProcess(settings):
            async with asyncio.timeout(60):
                while (await api.client.get("/readyz")).status_code != 200:
                    await asyncio.sleep(0.05)
            yield api


async def test_two_hundred_streams_lose_nothing(busy_api: RunningApi) -> None:
    video_id = await upload(busy_api)

    async def ask(number: int) -> list[bytes]:
        question = f"sleep:0.01 What is the answer to {number}?"
        messages = about(video_id, question) if number % 2 else None
        body = {
            "messages": messages or [{"role": "user", "content": question}],
            "max_completion_tokens": NUM_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with client.stream("POST", PATH, json=body) as response:
            assert response.status_code == 200, await response.aread()
            return [piece async for piece in response.aiter_raw()]

    limits = httpx.Limits(max_connections=None)
    base_url = busy_api.client.base_url
    async with httpx.AsyncClient(base_url=base_url, limits=limits, timeout=90) as client:
        answers = await asyncio.gather(*map(ask, range(NUM_STREAMS)))

    num_tokens = 0
    for number, pieces in enumerate(answers):
        ids = answer(f"sleep:0.01 What is the answer to {number}?", NUM_TOKENS)
        measured = measure(pieces)
        assert measured.text == "".join(map(text_of, ids))
        assert measured.usage["completion_tokens"] == NUM_TOKENS
        assert measured.num_timed <= NUM_TOKENS
        *_, last, end = b"".join(pieces).split(b"data: ")
        assert json.loads(last)["choices"] == [] and end.strip() == b"[DONE]"
        num_tokens += measured.usage["completion_tokens"]
    assert num_tokens == NUM_STREAMS * NUM_TOKENS
    labels = f'model="{MODEL}",outcome="done",policy="dycoke",requested="fixed"'
    await until_page_says(busy_api, f"dycoke_requests_total{{{labels}}} 100.0")
    async with asyncio.timeout(PATIENCE_S):
        await busy_api.api.streams.wait_until_none()


async def until_page_says(api: RunningApi, line: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while line not in await api.metrics():
            await asyncio.sleep(0.02)


# --- after their clients ---


async def test_an_answer_continues_without_its_client_where_that_is_asked(
    api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI
) -> None:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=hello(),
        stream=True,
        extra_body={"on_disconnect": "continue"},
    )
    job_id = stream.response.headers["x-job-id"]
    delivery = await worker.take()
    await worker.say(delivery, 0)
    await anext(aiter(stream))
    await stream.close()
    await until_page_says(api, "dycoke_client_disconnects_total 1.0")
    assert await worker.say(delivery, 1)
    assert await worker.finish(delivery, 2)

    await until_state(api, job_id, "done")
    events = parse_events((await api.client.get(f"/v1/jobs/{job_id}/events")).text)
    said = [event for event in events if event.name == "token"]
    assert "".join(event.data["text"] for event in said) == "t0 t1 "
    assert events[-1].name == "done" and events[-1].data["usage"]["completion_tokens"] == 2
    assert said[0].id is not None
    rest = parse_events(
        (
            await api.client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": said[0].id})
        ).text
    )
    assert [event.id for event in rest] == [event.id for event in events if event.id > said[0].id]


async def test_the_same_key_streams_the_whole_answer_again(
    api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI
) -> None:
    again: dict[str, Any] = {
        "model": MODEL,
        "messages": hello(),
        "stream": True,
        "extra_body": {"on_disconnect": "continue"},
        "extra_headers": {"Idempotency-Key": "once"},
    }
    first = await client.chat.completions.create(**again)
    delivery = await worker.take()
    await worker.say(delivery, 0)
    await anext(aiter(first))
    await first.close()
    second = await client.chat.completions.create(**again)
    await worker.say(delivery, 1)
    await worker.finish(delivery, 2)
    chunks = [chunk async for chunk in second]
    assert second.response.headers["x-job-id"] == delivery.job_id
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "t0 t1 "
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_a_client_that_waits_for_the_whole_answer_cancels_by_leaving(
    api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI
) -> None:
    asking = asyncio.create_task(
        client.chat.completions.create(model=MODEL, messages=hello(), stream=False)
    )
    delivery = await worker.take()
    await worker.say(delivery, 0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await until_state(api, delivery.job_id, "cancelled")
    assert not await worker.say(delivery, 1)


async def test_the_clients_own_accumulation_finds_the_whole_answer(
    api: RunningApi, worker: ScriptedWorker, client: AsyncOpenAI
) -> None:
    answering = asyncio.create_task(worker.answer(3))
    async with client.chat.completions.stream(
        model=MODEL, messages=hello(), stream_options={"include_usage": True}
    ) as stream:
        deltas = [event.delta async for event in stream if event.type == "content.delta"]
        completion = await stream.get_final_completion()
    await answering
    assert "".join(deltas) == completion.choices[0].message.content == "t0 t1 t2 "
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None and completion.usage.completion_tokens == 3
