"""The OpenAI client and the bundled model, through the whole service."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.integration.benchmark_client import measure, payload
from tests.integration.openai_client import PATH
from tests.integration.test_service import Service, receipt_of, running_service
from tests.video_clips import make_clip

QUESTION = "What happens in the video?"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("openai")) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{service.client.base_url}/v1", api_key="none", timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def video_id(service: Service) -> str:
    return service.upload()


def about(video_id: str) -> list[Any]:
    part = {"type": "video_url", "video_url": {"url": video_id}}
    return [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]


def ask(client: OpenAI, messages: list[Any], **options: Any) -> Any:
    return client.chat.completions.create(model="dycoke-tiny", messages=messages, **options)


def test_the_answer_is_that_of_the_other_surface(
    service: Service, client: OpenAI, video_id: str
) -> None:
    expected = receipt_of(service.ask(video_id, question=QUESTION, max_tokens=16))
    whole = ask(client, about(video_id), max_completion_tokens=16)
    assert whole.choices[0].message.content == expected["text"]
    assert whole.choices[0].finish_reason == expected["finish_reason"]
    used = whole.usage
    assert used.prompt_tokens == expected["usage"]["prompt_tokens"]
    assert used.completion_tokens == expected["usage"]["completion_tokens"]
    cached = used.prompt_tokens_details.cached_tokens
    assert 0 < used.prompt_tokens_details.multimodal_tokens["video"] < cached < used.prompt_tokens
    chunks = list(
        ask(
            client,
            about(video_id),
            max_completion_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *tokens, last = chunks
    text = "".join(chunk.choices[0].delta.content for chunk in tokens)
    assert text == expected["text"]
    assert len(tokens) <= last.usage.completion_tokens == used.completion_tokens
    assert [chunk.choices[0].finish_reason for chunk in tokens[:-1]] == [None] * (len(tokens) - 1)
    assert tokens[-1].choices[0].finish_reason == expected["finish_reason"]


def test_seeds_reproduce_and_stop_strings_stop(client: OpenAI, video_id: str) -> None:
    drawn = [
        ask(client, about(video_id), temperature=1.0, seed=seed, max_completion_tokens=12)
        for seed in (3, 3, 4, 5, 6)
    ]
    texts = [answer.choices[0].message.content for answer in drawn]
    assert texts[0] == texts[1] and len(set(texts)) > 1
    whole = ask(client, about(video_id), max_completion_tokens=16).choices[0].message.content
    word = whole.split()[2]
    stopped = ask(client, about(video_id), max_completion_tokens=16, stop=word).choices[0]
    assert stopped.message.content == whole.partition(word)[0]
    assert stopped.finish_reason == "stop"


def test_text_alone_is_answered(client: OpenAI, service: Service) -> None:
    messages = [{"role": "user", "content": "How many objects are there?"}]
    answer = ask(client, messages, max_completion_tokens=6, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 6
    receipt = answer.model_extra["dycoke"]
    assert receipt["video_id"] is None and receipt["timings_s"]["vision"] == 0
    (page,) = service.worker_metrics().values()
    assert 'dycoke_prompt_tokens_total{model="dycoke-tiny",policy="none"}' in page
    assert 'dycoke_visual_tokens_total{model="dycoke-tiny",policy="none"' not in page
    assert 'dycoke_flops_total{kind="full",model="dycoke-tiny",policy="none"}' not in page


def test_benchmarks_get_every_token_they_ask_for(service: Service, tmp_path: Path) -> None:
    """With a random clip as `vllm bench serve` makes them: MPEG-4 Part 2 at 30 fps."""
    clip = make_clip(tmp_path / "random.mp4", codec="mpeg4", fps=30)
    (model,) = service.client.get("/v1/models").json()["data"]
    url = f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}"
    body = payload(model["id"], url, "random words", 16, ignore_eos=True, temperature=0.0, top_k=20)
    headers = {"x-request-id": "bench-1"}
    with service.client.stream("POST", PATH, json=body, headers=headers) as response:
        assert response.status_code == 200, response.read()
        measured = measure(response.iter_raw())
    assert model["root"] == model["id"]
    assert measured.usage["completion_tokens"] == 16 and measured.num_timed <= 16
    assert (
        measured.usage["prompt_tokens"]
        > measured.usage["prompt_tokens_details"]["multimodal_tokens"]["video"]
    )
    assert measured.text
