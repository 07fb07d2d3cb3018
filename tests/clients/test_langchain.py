"""LangChain's `ChatOpenAI` with raw video parts, unmodified."""

from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from tests.clients.conftest import NUM_TOKENS, QUESTION


@pytest.fixture
def chat(url: str, model: str) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{url}/v1",
        api_key=SecretStr("none"),
        model=model,
        max_tokens=NUM_TOKENS,
        stream_usage=True,
    )


def about(video_id: str) -> list[Any]:
    part = {"type": "video_url", "video_url": {"url": video_id}}
    return [HumanMessage(content=[part, {"type": "text", "text": QUESTION}])]


def check(message: Any, expected: Any) -> None:
    assert message.content == expected["text"]
    assert message.response_metadata["finish_reason"] == expected["finish_reason"]
    used = message.usage_metadata
    assert used["input_tokens"] == expected["usage"]["prompt_tokens"]
    assert used["output_tokens"] == expected["usage"]["completion_tokens"]


def test_a_whole_answer(chat: ChatOpenAI, video_id: str, expected: Any) -> None:
    check(chat.invoke(about(video_id)), expected)


def test_a_stream_and_its_usage(chat: ChatOpenAI, video_id: str, expected: Any) -> None:
    first, *others = chat.stream(about(video_id))
    whole = first
    for chunk in others:
        whole += chunk
    check(whole, expected)


def test_two_at_a_time(chat: ChatOpenAI, video_id: str, expected: Any) -> None:
    for message in chat.batch([about(video_id), about(video_id)]):
        check(message, expected)


def test_its_standard_block_raises_on_its_own_side(chat: ChatOpenAI) -> None:
    """If this begins to work, the documents should recommend it."""
    block = {"type": "video", "base64": "AAAA", "mime_type": "video/mp4"}
    with pytest.raises(ValueError, match="video"):
        chat.invoke([HumanMessage(content=[block])])


def test_errors_are_openais(chat: ChatOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        chat.invoke(about("vid_" + "0" * 64))
    assert missing.value.code == "video_not_found"
