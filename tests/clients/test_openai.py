"""openai-python at the release that the other clients bring along.

What the newest release sends and reads is tested in `tests/integration/test_openai_*`.
"""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients.conftest import NUM_TOKENS
from tests.serving import CLIP


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield client


@pytest.fixture
def question(model: str, messages: list[Any]) -> dict[str, Any]:
    return {"model": model, "messages": messages, "max_completion_tokens": NUM_TOKENS}


def test_a_whole_answer(client: openai.OpenAI, question: Any, expected: Any) -> None:
    answer = client.chat.completions.create(**question)
    assert answer.choices[0].message.content == expected["text"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == expected["usage"]["completion_tokens"]
    assert answer.model_extra is not None
    assert answer.model_extra["dycoke"]["compression"]["policy"] == "dycoke"


def test_a_stream_and_its_usage(client: openai.OpenAI, question: Any, expected: Any) -> None:
    *chunks, last = client.chat.completions.create(
        **question, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected["text"]
    assert last.choices == [] and last.usage.prompt_tokens == expected["usage"]["prompt_tokens"]


def test_files_go_round(client: openai.OpenAI, question: Any, expected: Any) -> None:
    clip = CLIP.read_bytes() + b"\0\0\0\x08free"  # the same pictures, another file
    file = client.files.create(file=("clip.mp4", clip), purpose="user_data")
    part = {"type": "file", "file": {"file_id": file.id}}
    question["messages"][0]["content"][0] = part
    answer = client.chat.completions.create(**question)
    assert answer.choices[0].message.content == expected["text"]
    assert client.files.content(file.id).read() == clip
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        client.chat.completions.create(**question)
    assert gone.value.code == "video_not_found"
    assert gone.value.response.headers["x-should-retry"] == "false"


def test_a_key_makes_one_job_of_two_posts(client: openai.OpenAI, question: Any) -> None:
    key = {"Idempotency-Key": "clients-once"}
    first = client.chat.completions.create(**question, extra_headers=key)
    second = client.chat.completions.create(**question, extra_headers=key)
    assert first.id == second.id
