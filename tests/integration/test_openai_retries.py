"""What the OpenAI client tries again on its own, and what it sends with each try."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from app.store.keys import RedisKeys
from tests.integration.api import MODEL, RunningApi, ScriptedWorker, running_api, until
from tests.integration.conftest import RedisServer
from tests.integration.openai_client import client_of, hello

KEY = "idempotency-key"
QUESTION: dict[str, Any] = {"model": MODEL, "messages": hello()}


@asynccontextmanager
async def retrying_client(api: RunningApi) -> AsyncIterator[tuple[AsyncOpenAI, list[Any]]]:
    """A patient client, and the headers of all that it sends."""
    sent: list[Any] = []

    async def note(request: Any) -> None:
        sent.append(request.headers)

    http_client = DefaultAsyncHttpxClient(event_hooks={"request": [note]})
    async with client_of(api, max_retries=10, http_client=http_client) as client:
        yield client, sent


@pytest.fixture
async def full_api(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> AsyncIterator[RunningApi]:
    """One that takes one job at a time."""
    async with running_api(redis_server.url, keys, tmp_path, max_queued_jobs=1) as api:
        yield api


async def test_a_refusal_that_may_pass_is_tried_again_without_a_key(
    full_api: RunningApi, worker: ScriptedWorker
) -> None:
    async with retrying_client(full_api) as (client, sent), client_of(full_api) as other:
        stream = await other.chat.completions.create(**QUESTION, stream=True)
        asking = asyncio.create_task(client.chat.completions.create(**QUESTION, stream=True))
        await until(lambda: len(sent) == 2)  # the first was refused: the queue is full
        await worker.answer(1)
        assert [chunk async for chunk in stream]
        again = await asking
        await worker.answer(2)
        texts = [chunk.choices[0].delta.content async for chunk in again]
    assert "".join(map(str, texts)) == "t0 t1 "
    assert [headers["x-stainless-retry-count"] for headers in sent] == [
        str(number) for number in range(len(sent))
    ]
    assert not any(KEY in headers for headers in sent)


async def test_every_try_carries_the_key_that_a_caller_gives(
    full_api: RunningApi, worker: ScriptedWorker
) -> None:
    async with retrying_client(full_api) as (client, sent), client_of(full_api) as other:
        stream = await other.chat.completions.create(**QUESTION, stream=True)
        asking = asyncio.create_task(
            client.chat.completions.create(**QUESTION, extra_headers={"Idempotency-Key": "mine"})
        )
        await until(lambda: len(sent) == 2)
        await worker.answer(1)
        assert [chunk async for chunk in stream]
        await worker.answer(1)
        first = await asking
        second = await client.chat.completions.create(
            **QUESTION, extra_headers={"Idempotency-Key": "mine"}
        )
    assert second.id == first.id  # no third job: none has been answered
    assert [headers[KEY] for headers in sent] == ["mine"] * len(sent)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"n": 2}, "invalid_request"),
        ({"model": "gpt-5"}, "model_not_found"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_request"),
    ],
)
async def test_what_can_only_fail_again_is_sent_once(
    fields: dict[str, Any], code: str, api: RunningApi, worker: ScriptedWorker
) -> None:
    async with retrying_client(api) as (client, sent):
        with pytest.raises(openai.APIStatusError) as refused:
            await client.chat.completions.create(**{**QUESTION, **fields})
    assert refused.value.code == code
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert len(sent) == 1


async def test_a_conflict_is_no_reason_to_try_again(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    """By its status alone, 409, the client would."""
    question = {**QUESTION, "extra_headers": {"Idempotency-Key": "once"}}
    async with retrying_client(api) as (client, sent):
        answering = asyncio.create_task(worker.answer(1))
        await client.chat.completions.create(**question)
        await answering
        with pytest.raises(openai.ConflictError):
            await client.chat.completions.create(**question, seed=1)
    assert len(sent) == 2


async def test_a_failed_job_is_not_asked_for_again(
    api: RunningApi, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its status alone, 500, the client would."""

    def fail(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("app.api.openai.intake.parse_messages", fail)
    async with retrying_client(api) as (client, sent):
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(**QUESTION)
    assert len(sent) == 1
