"""Policy `auto` over HTTP: what a request may ask, and what the metrics of its answer name."""

import asyncio
import json
from typing import Any

import pytest

from app.messages import CompressionChoice
from dycoke_core.auto import DEFAULT_LADDER, AutoConfig, Reason
from tests.integration.api import RunningApi, ScriptedWorker
from tests.integration.openai_client import PATH, about, upload


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("auto", AutoConfig()),
        ({"policy": "auto", "objective_s": 1, "at_least": 0.5}, AutoConfig(1.0, 0.5)),
    ],
)
async def test_a_request_for_auto_reaches_the_worker_complete(
    api: RunningApi, worker: ScriptedWorker, asked: Any, expected: AutoConfig
) -> None:
    post = asyncio.create_task(api.post(compression=asked, stream=False))
    delivery = await worker.take()
    assert delivery.request.compression == expected.as_dict()
    await worker.finish(delivery, 1)
    assert (await post).status_code == 200


@pytest.mark.parametrize(("deadline_s", "objective_s"), [(30, 30.0), (90, 60.0)])
async def test_the_objective_is_at_most_the_deadline_on_both_surfaces(
    api: RunningApi, worker: ScriptedWorker, deadline_s: float, objective_s: float
) -> None:
    """A first token after it would be of no use."""
    asked = {"policy": "auto", "objective_s": 60}
    post = asyncio.create_task(api.post(compression=asked, deadline_s=deadline_s, stream=False))
    delivery = await worker.answer()
    assert (await post).status_code == 200
    video = delivery.request.video_id
    assert video is not None
    body = {"messages": about(video), "compression": asked, "deadline_s": deadline_s}
    completion = asyncio.create_task(api.client.post(PATH, json=body))
    other = await worker.answer()
    assert (await completion).status_code == 200
    for request in (delivery.request, other.request):
        assert request.compression == AutoConfig(objective_s).as_dict()


async def test_metrics_have_the_policy_that_was_chosen_beside_who_chose(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    post = asyncio.create_task(api.post(compression="auto", stream=True))
    delivery = await worker.take()
    choice = CompressionChoice(
        compression={"policy": "full"}, level=0, reason=Reason.OBJECTIVE, predicted_ttft_s=1.0
    )
    await worker.status(delivery, "encoding", 0.0, choice)
    await worker.say(delivery, 0)
    await worker.say(delivery, 1)
    await worker.finish(delivery, 2, choice)
    assert (await post).status_code == 200
    labels = 'model="tiny",policy="full",requested="auto"'
    count = f"dycoke_inter_token_latency_seconds_count{{{labels}}} 1.0"
    ended = 'dycoke_requests_total{model="tiny",outcome="done",policy="full",requested="auto"} 1.0'
    text = await api.metrics()
    assert count in text and ended in text
    before = 'dycoke_requests_total{model="tiny",outcome="done",policy="auto",requested="auto"} 0.0'
    assert before in text, "the counter of those that end before a choice"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_completion_tells_the_choice(
    api: RunningApi, worker: ScriptedWorker, stream: bool
) -> None:
    body = {"messages": about(await upload(api)), "compression": "auto", "stream": stream}
    post = asyncio.create_task(api.client.post(PATH, json=body))
    delivery = await worker.take()
    choice = CompressionChoice(
        compression=DEFAULT_LADDER[3].as_dict(),
        level=3,
        reason=Reason.QUEUE,
        predicted_ttft_s=1.5,
    )
    await worker.status(delivery, "encoding", 0.0, choice)
    await worker.say(delivery, 0)
    await worker.finish(delivery, 1, choice)
    response = await post
    if stream:
        *_, last, end = (line for line in response.text.splitlines() if line)
        assert end == "data: [DONE]"
        answer = json.loads(last.removeprefix("data: "))
    else:
        answer = response.json()
    compression = answer["dycoke"]["compression"]
    assert compression["policy"] == "dycoke"
    auto = compression["auto"]
    assert (auto["level"], auto["reason"], auto["predicted_ttft_s"]) == (3, "queue", 1.5)
    assert auto["objective_s"] == AutoConfig().objective_s


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"policy": "auto", "objective_s": -1}, "compression.objective_s"),
        ({"policy": "auto", "k": 0.5}, "takes no parameter 'k'"),
        ({"policy": "auto", "ladder": ["full"]}, "takes no parameter 'ladder'; it takes: at_least"),
        ({"policy": "fastest"}, "compression.policy must be one of: auto, dycoke"),
        ({"policy": ["full"]}, "compression.policy must be one of: auto, dycoke"),
    ],
)
async def test_auto_takes_no_other_parameter(
    api: RunningApi, worker: ScriptedWorker, asked: Any, word: str
) -> None:
    response = await api.post(compression=asked)
    assert response.status_code == 400
    assert word in response.json()["detail"]
