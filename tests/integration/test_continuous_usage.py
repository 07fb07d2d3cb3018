"""`continuous_usage_stats`: from the worker's engine to each chunk of the stream."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.messages import TokenEvent
from tests.integration.api import RunningApi, parse_events
from tests.integration.fake_engine import PROMPT_TOKENS
from tests.integration.workers import RunningWorker, running, wait_until


@pytest.fixture
async def worker(api: RunningApi) -> AsyncIterator[RunningWorker]:
    """A real one, with a fake engine."""
    async with running(api.settings) as worker:

        async def is_ready() -> bool:
            return (await api.client.get("/readyz")).status_code == 200

        await wait_until(is_ready)
        yield worker


async def chunks(api: RunningApi, **options: Any) -> list[dict[str, Any]]:
    body = {
        "messages": [{"role": "user", "content": "Why?"}],
        "stream": True,
        "stream_options": options,
        "max_tokens": 5,
    }
    response = await api.client.post("/v1/chat/completions", json=body)
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_every_chunk_has_the_counts_so_far(api: RunningApi, worker: RunningWorker) -> None:
    *of_tokens, last = await chunks(api, include_usage=True, continuous_usage_stats=True)
    counts = [chunk["usage"] for chunk in of_tokens]
    completed = [count["completion_tokens"] for count in counts]
    # How many tokens share a chunk varies.
    assert completed == sorted(set(completed)) and completed[0] >= 1 and completed[-1] == 5
    for count in counts:
        assert count["prompt_tokens"] == PROMPT_TOKENS
        assert count["total_tokens"] == PROMPT_TOKENS + count["completion_tokens"]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 5
    assert "prompt_tokens_details" in last["usage"] and last["dycoke"]["warnings"] == []


async def test_without_it_usage_comes_at_the_end_alone(
    api: RunningApi, worker: RunningWorker
) -> None:
    *of_tokens, last = await chunks(api, include_usage=True)
    assert all(chunk["usage"] is None for chunk in of_tokens)
    assert last["usage"]["prompt_tokens"] == PROMPT_TOKENS
    *_, last = alone = await chunks(api, continuous_usage_stats=True)
    assert not any("usage" in chunk for chunk in alone)
    warning = "stream_options.continuous_usage_stats: needs include_usage"
    assert last["dycoke"]["warnings"] == [warning]


async def test_events_of_other_requests_say_nothing_of_it(
    api: RunningApi, worker: RunningWorker
) -> None:
    events = parse_events((await api.post(max_tokens=2)).text)
    tokens = [event.data for event in events if event.name == "token"]
    assert tokens and not any("prompt_tokens" in data for data in tokens)


def test_the_count_is_left_out_where_there_is_none() -> None:
    event = TokenEvent(index=0, text="a", token_ids=[1])
    assert "prompt_tokens" not in event.model_dump_json()
    told = event.model_copy(update={"prompt_tokens": 20})
    assert TokenEvent.model_validate_json(told.model_dump_json()) == told
