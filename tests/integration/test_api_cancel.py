"""DELETE on a job, in each of its states."""

import asyncio
from pathlib import Path
from typing import Any

from app.store.keys import RedisKeys
from tests.integration.api import (
    EventReader,
    RunningApi,
    ScriptedWorker,
    only_job,
    parse_events,
    running_api,
    until,
    until_state,
)
from tests.integration.conftest import RedisServer


async def cancel(api: RunningApi, job_id: str) -> dict[str, Any]:
    response = await api.client.delete(f"/v1/jobs/{job_id}")
    assert response.status_code == 200
    job: dict[str, Any] = response.json()
    return job


async def test_delete_cancels_a_job_whose_frames_are_being_read(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    api.readers.may_read.clear()
    async with api.posting() as response:
        reader = EventReader(response)
        await reader.until("status", stage="reading_frames")
        assert (await cancel(api, response.headers["x-job-id"]))["state"] == "cancelled"
        error = (await reader.rest())[-1]
    assert (error.name, error.data["code"]) == ("error", "cancelled")
    await until(lambda: api.readers.num_cancelled == 1)
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0


async def test_delete_in_another_api_stops_the_reading_here(
    api: RunningApi,
    worker: ScriptedWorker,
    redis_server: RedisServer,
    keys: RedisKeys,
    tmp_path: Path,
) -> None:
    api.readers.may_read.clear()
    async with running_api(redis_server.url, keys, tmp_path) as other, api.posting() as response:
        reader = EventReader(response)
        await reader.until("status", stage="reading_frames")
        await cancel(other, response.headers["x-job-id"])
        assert (await reader.rest())[-1].data["code"] == "cancelled"
        await until(lambda: api.readers.num_cancelled == 1)


async def test_delete_cancels_a_queued_job(api: RunningApi, worker: ScriptedWorker) -> None:
    post = asyncio.create_task(api.post(stream=False))
    await until(lambda: api.readers.num_reads == 1)
    job_id = await only_job(api)
    await until_state(api, job_id, "queued")
    job = await cancel(api, job_id)
    assert (job["state"], job["error"]["code"]) == ("cancelled", "cancelled")
    assert (await post).status_code == 409
    assert (await post).json()["code"] == "cancelled"
    assert await worker.leases.take(block_s=0.1) is None


async def test_delete_cancels_a_running_job(api: RunningApi, worker: ScriptedWorker) -> None:
    post = asyncio.create_task(api.post())
    delivery = await worker.take()
    assert await worker.say(delivery, 0)
    await cancel(api, delivery.job_id)
    assert not await worker.say(delivery, 1)
    assert parse_events((await post).text)[-1].data["code"] == "cancelled"


async def test_delete_of_an_ended_job_leaves_it_as_it_is(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    post = asyncio.create_task(api.post())
    delivery = await worker.answer()
    await post
    assert (await cancel(api, delivery.job_id))["state"] == "done"
