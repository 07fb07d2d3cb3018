"""LiteLLM's provider `hosted_vllm`, unmodified."""

import asyncio
import base64
from typing import Any

import litellm
import pytest

from tests.clients.conftest import NUM_TOKENS, QUESTION
from tests.serving import CLIP


@pytest.fixture
def options(url: str, model: str) -> dict[str, Any]:
    return {
        "model": f"hosted_vllm/{model}",
        "api_base": f"{url}/v1",
        "max_tokens": NUM_TOKENS,
        "num_retries": 0,
    }


def with_part(part: dict[str, Any]) -> list[Any]:
    return [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]


def test_a_whole_answer(options: Any, messages: list[Any], expected: Any) -> None:
    answer = litellm.completion(messages=messages, **options)
    (choice,) = answer.choices
    assert choice.message.content == expected["text"]
    assert choice.finish_reason == expected["finish_reason"]
    assert answer.usage.prompt_tokens == expected["usage"]["prompt_tokens"]
    assert answer.usage.completion_tokens == expected["usage"]["completion_tokens"]


def test_a_stream_and_its_usage(options: Any, messages: list[Any], expected: Any) -> None:
    chunks = list(
        litellm.completion(
            messages=messages, stream=True, stream_options={"include_usage": True}, **options
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected["text"]
    (used,) = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    assert used.prompt_tokens == expected["usage"]["prompt_tokens"]
    assert used.completion_tokens == expected["usage"]["completion_tokens"]


async def collect(options: Any, messages: list[Any]) -> str:
    stream = await litellm.acompletion(messages=messages, stream=True, **options)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_a_stream_on_an_event_loop(options: Any, messages: list[Any], expected: Any) -> None:
    assert asyncio.run(collect(options, messages)) == expected["text"]


@pytest.mark.parametrize("form", ["file_id", "file_data"])
def test_a_file_part_becomes_a_video(form: str, options: Any, video_id: str, expected: Any) -> None:
    """With the file's id as its URL, which is no URL, or with its data."""
    data = base64.b64encode(CLIP.read_bytes()).decode()
    file = {
        "file_id": {"file_id": video_id, "format": "video/mp4"},
        "file_data": {"file_data": f"data:video/mp4;base64,{data}"},
    }[form]
    answer = litellm.completion(messages=with_part({"type": "file", "file": file}), **options)
    assert answer.choices[0].message.content == expected["text"]


def test_what_goes_beside_openais_fields(options: Any, messages: list[Any], expected: Any) -> None:
    assert expected["compression"]["policy"] == "dycoke"
    answer = litellm.completion(
        messages=messages, extra_body={"compression": "full"}, stop=["."], seed=1, **options
    )
    assert answer.usage.prompt_tokens > expected["usage"]["prompt_tokens"]
    assert "." not in answer.choices[0].message.content


def test_errors_are_its_own_classes(options: Any) -> None:
    unknown = {"type": "video_url", "video_url": {"url": "vid_" + "0" * 64}}
    with pytest.raises(litellm.NotFoundError) as missing:
        litellm.completion(messages=with_part(unknown), **options)
    assert missing.value.status_code == 404
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    with pytest.raises(litellm.BadRequestError, match="are not supported"):
        litellm.completion(messages=with_part(image), **options)
