"""Chat completions whose connection ends early, or is tried again."""

import asyncio

import openai
import pytest
from openai import AsyncOpenAI

from tests.integration.api import (
    MODEL,
    RunningApi,
    ScriptedWorker,
    until,
    until_state,
)
from tests.integration.openai_client import about, upload


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
