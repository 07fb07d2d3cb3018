"""Chat completions that fail: what is wrong is named, as an error of OpenAI's own kind."""

from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from app.store.keys import RedisKeys
from dycoke_core.errors import UnreadableVideoError
from tests.integration.api import (
    MODEL,
    RunningApi,
    ScriptedWorker,
    running_api,
)
from tests.integration.conftest import RedisServer
from tests.integration.openai_client import PATH, about, client_of, upload

KEYS = "k" * 40


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


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"messages": []', "the body is not valid JSON: see line 1, column 15"),
        # The place would be one in the text that is parsed, which lacks the medium.
        (b'{"url": "data:video/mp4;base64,AAAA"', "the body is not valid JSON"),
    ],
)
async def test_malformed_json_is_refused_with_its_place_where_that_is_the_client_s(
    body: bytes, message: str, api: RunningApi, worker: ScriptedWorker
) -> None:
    headers = {"content-type": "application/json"}
    response = await api.client.post(PATH, content=body, headers=headers)
    assert response.status_code == 400 and response.json()["error"]["message"] == message


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
