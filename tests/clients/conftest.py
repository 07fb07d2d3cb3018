"""One service for all clients, run by the interpreter that `SERVER_PYTHON` names."""

import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving import CLIP, ROOT, running_service

# Set before it is imported: otherwise it asks the internet for a list of prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

QUESTION = "What happens in the video?"
NUM_TOKENS = 20


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    with running_service(ROOT, {}, python=os.environ["SERVER_PYTHON"]) as url:
        yield url


@pytest.fixture(scope="session")
def http(url: str) -> Iterator[httpx.Client]:
    """For what the client under test does not do itself."""
    with httpx.Client(base_url=url, timeout=60) as http:
        yield http


@pytest.fixture(scope="session")
def model(http: httpx.Client) -> str:
    return str(http.get("/v1/models").json()["data"][0]["id"])


@pytest.fixture(scope="session")
def video_id(http: httpx.Client) -> str:
    uploaded = http.post("/v1/videos", files={"video": CLIP.read_bytes()})
    return str(uploaded.raise_for_status().json()["video_id"])


@pytest.fixture(scope="session")
def expected(http: httpx.Client, video_id: str) -> dict[str, Any]:
    """What the service answers on its own surface: its last event."""
    body = {
        "video_id": video_id,
        "question": QUESTION,
        "max_tokens": NUM_TOKENS,
        "stream": False,
    }
    answer: dict[str, Any] = http.post("/v1/video/chat", json=body).raise_for_status().json()
    assert answer["usage"]["completion_tokens"] > 3
    return answer


@pytest.fixture
def messages(video_id: str) -> list[Any]:
    """The question in the form that OpenAI's clients send."""
    part = {"type": "video_url", "video_url": {"url": video_id}}
    return [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]
