"""The real OpenAI client on a test's server, and messages for it."""

from typing import Any

from openai import AsyncOpenAI

from tests.integration.api import CLIP, RunningApi

PATH = "/v1/chat/completions"


def client_of(api: RunningApi, **options: Any) -> AsyncOpenAI:
    """One that tries once, unless a test says otherwise."""
    options = {"api_key": "none", "max_retries": 0, "timeout": 20, **options}
    return AsyncOpenAI(base_url=f"http://127.0.0.1:{api.port}/v1", **options)


async def upload(api: RunningApi) -> str:
    response = await api.client.post("/v1/videos", files={"video": CLIP})
    return str(response.json()["video_id"])


def about(video: str, text: str = "What happens?", **options: Any) -> list[Any]:
    """A question about a video, by its id or URL; `options` say how it is sampled."""
    part = {"type": "video_url", "video_url": {"url": video, **options}}
    return [{"role": "user", "content": [{"type": "text", "text": text}, part]}]


def hello() -> list[Any]:
    """A question without a video."""
    return [{"role": "user", "content": "Hello"}]
