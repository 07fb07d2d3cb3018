"""Deadlines over HTTP: from the request to the job, and what a client gets when one passes."""

import asyncio
import re
from collections import Counter
from pathlib import Path

from app.store.keys import RedisKeys
from tests.integration.api import (
    EventReader,
    RunningApi,
    ScriptedWorker,
    running_api,
    until,
)
from tests.integration.conftest import RedisServer
from tests.integration.openai_client import PATH, hello


async def test_a_deadline_is_of_the_job_on_both_surfaces(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    posting = asyncio.create_task(api.post(stream=False, deadline_s=90.5))
    delivery = await worker.answer()
    request = delivery.request
    assert (request.deadline_s, request.deadline_at_s) == (90.5, request.accepted_at_s + 90.5)
    assert (await posting).status_code == 200
    job = (await api.client.get(f"/v1/jobs/{delivery.job_id}")).json()
    assert job["deadline_at_s"] == request.deadline_at_s

    answering = asyncio.create_task(worker.answer(1))
    body = {"messages": hello(), "deadline_s": 70}
    assert (await api.client.post(PATH, json=body)).status_code == 200
    request = (await answering).request
    assert (request.deadline_s, request.deadline_at_s) == (70, request.accepted_at_s + 70)


async def test_without_one_a_job_has_the_servers(api: RunningApi, worker: ScriptedWorker) -> None:
    posting = asyncio.create_task(api.post(stream=False))
    request = (await worker.answer()).request
    assert (await posting).status_code == 200
    assert request.deadline_s is None
    assert request.deadline_at_s == request.accepted_at_s + api.settings.job_timeout_s


async def test_a_deadline_that_passes_while_the_job_waits_ends_it(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    async with api.posting(deadline_s=2) as response:
        assert response.status_code == 200
        reader = EventReader(response)
        events = []
        while (event := await reader.next()) is not None:
            events.append(event)
    assert events[-1].name == "error"
    assert (events[-1].data["code"], events[-1].data["retryable"]) == ("deadline_exceeded", True)
    whole = await api.post(stream=False, deadline_s=2)
    assert (whole.status_code, whole.json()["code"]) == (504, "deadline_exceeded")
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0
    assert await ended(api) == {"client_deadline_exceeded": 2}


async def test_a_deadline_that_passes_while_frames_are_read_stops_the_reader(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    api.readers.may_read.clear()
    response = await api.post(stream=False, deadline_s=2)
    assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")
    await until(lambda: api.readers.num_cancelled == 1)
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0


async def test_the_servers_own_deadline_counts_against_the_service(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    async with running_api(redis_server.url, keys, tmp_path, job_timeout_s=2.0) as api:
        response = await api.post(stream=False)
        assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")
        assert await ended(api) == {"deadline_exceeded": 1}
        body = {"messages": hello(), "deadline_s": 1}
        completion = await api.client.post(PATH, json=body)
        assert completion.json()["error"]["code"] == "deadline_exceeded", "clients see one code"
        assert await ended(api) == {"deadline_exceeded": 1, "client_deadline_exceeded": 1}


async def ended(api: RunningApi) -> dict[str, int]:
    """How many jobs came to each end, as the API counts them."""
    pattern = r'dycoke_requests_total{.*outcome="(\w+)".*} (\d+)'
    counts: Counter[str] = Counter()
    for outcome, number in re.findall(pattern, await api.metrics()):
        counts[outcome] += int(number)
    return {outcome: number for outcome, number in counts.items() if number}


async def test_a_refusal_names_the_video_and_says_when_to_come_back(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    refused = await api.post(deadline_s=1e-6)
    problem = refused.json()
    assert (refused.status_code, problem["code"]) == (504, "deadline_unreachable")
    assert problem["retryable"] and refused.headers["retry-after"] == "1"
    assert problem["video_id"] and "passed before the request was complete" in problem["detail"]
    completion = await api.client.post(PATH, json={"messages": hello(), "deadline_s": 1e-6})
    assert completion.status_code == 504
    assert completion.json()["error"]["code"] == "deadline_unreachable"
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0
