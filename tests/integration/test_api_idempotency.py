"""Idempotency keys: one job for a request that is sent again."""

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest

from app.errors import StoreUnavailableError
from app.store.keys import RedisKeys
from tests.integration.api import (
    CLIP,
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
from tests.integration.workers import wait_until


async def test_same_key_and_request_is_the_same_job(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    first = asyncio.create_task(api.post(headers=headers))
    delivery = await worker.take()
    second = asyncio.create_task(api.post(headers=headers))
    await asyncio.sleep(0.2)
    await worker.say(delivery, 0)
    await worker.finish(delivery, 1)
    texts = [parse_events((await post).text) for post in (first, second)]
    assert texts[0][-1] == texts[1][-1]
    third = await api.post(headers=headers)
    assert third.headers["x-job-id"] == delivery.job_id
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0
    assert api.readers.num_reads == 1


async def test_reader_by_idempotency_key_cancels_nothing(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    headers = {"Idempotency-Key": "k"}
    first = asyncio.create_task(api.post(headers=headers))
    delivery = await worker.take()
    async with api.posting(headers=headers) as second:
        assert second.headers["x-job-id"] == delivery.job_id
    await asyncio.sleep(0.3)
    assert await worker.say(delivery, 0)
    await worker.finish(delivery, 1)
    assert parse_events((await first).text)[-1].name == "done"


@pytest.mark.parametrize("is_reading", [True, False])
async def test_job_that_a_retry_has_found_outlives_its_first_connection(
    api: RunningApi, worker: ScriptedWorker, is_reading: bool
) -> None:
    """A dead connection may be noticed long after the client has tried again."""
    headers = {"Idempotency-Key": "k"}
    api.readers.may_read.clear()
    first = asyncio.create_task(api.post(headers=headers))
    await until(lambda: api.readers.num_reads == 1)
    if not is_reading:
        api.readers.may_read.set()
        await until_state(api, await only_job(api), "queued")
    async with api.posting(headers=headers) as retry:
        job_id = retry.headers["x-job-id"]
        first.cancel()

        async def is_noticed() -> bool:
            return "dycoke_client_disconnects_total 1.0" in await api.metrics()

        await wait_until(is_noticed)
        await api.api.cancellations.wait_until_none()
        api.readers.may_read.set()
        assert (await worker.answer()).job_id == job_id
        assert (await EventReader(retry).rest())[-1].name == "done"


async def test_adopted_job_is_cancelled_on_request(api: RunningApi, worker: ScriptedWorker) -> None:
    headers = {"Idempotency-Key": "k"}
    first = asyncio.create_task(api.post(headers=headers))
    delivery = await worker.take()
    async with api.posting(headers=headers):
        pass
    cancelled = await api.client.delete(f"/v1/jobs/{delivery.job_id}")
    assert cancelled.json()["state"] == "cancelled"
    assert parse_events((await first).text)[-1].data["code"] == "cancelled"


async def test_retry_keeps_the_job_whose_creation_got_no_answer(
    redis_server: RedisServer,
    keys: RedisKeys,
    tmp_path: Path,
    worker: ScriptedWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Redis carries out the creation, its reply is lost, and the retry finds the job elsewhere."""
    async with (
        running_api(redis_server.url, keys, tmp_path) as api,
        running_api(redis_server.url, keys, tmp_path) as other,
    ):
        queue = api.api.jobs.queue
        create, end, is_back = queue.create, queue.end, asyncio.Event()

        async def create_without_reply(*args: Any, **kwargs: Any) -> str:
            await create(*args, **kwargs)
            raise StoreUnavailableError("the job store does not answer")

        async def end_later(*args: Any, **kwargs: Any) -> bool:
            if not is_back.is_set():
                raise StoreUnavailableError("the job store does not answer")
            return await end(*args, **kwargs)

        monkeypatch.setattr(queue, "create", create_without_reply)
        monkeypatch.setattr(queue, "end", end_later)
        headers = {"Idempotency-Key": "k"}
        refused = await api.post(headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
        async with other.posting(headers=headers) as response:
            reader = EventReader(response)
            job = await reader.until("job")
            is_back.set()
            delivery = await worker.answer()
            assert delivery.job_id == job.data["job_id"]
            assert (await reader.rest())[-1].name == "done"


async def test_job_whose_creation_got_no_answer_ends_retryable_if_nobody_asks_again(
    api: RunningApi, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = api.api.jobs.queue
    create, created = queue.create, []

    async def create_without_reply(*args: Any, **kwargs: Any) -> str:
        created.append(await create(*args, **kwargs))
        raise StoreUnavailableError("the job store does not answer")

    monkeypatch.setattr(queue, "create", create_without_reply)
    assert (await api.post()).status_code == 503
    job = await until_state(api, created[0].job_id, "error", "cancelled")
    assert (job["error"]["code"], job["error"]["retryable"]) == ("store_unavailable", True)


async def test_retry_after_a_lost_connection_gets_a_job_of_its_own(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    """A cancelled job gives its idempotency key back; one that is done keeps it."""
    headers = {"Idempotency-Key": "k"}
    async with api.posting(headers=headers) as first:
        lost = await worker.take()
        assert first.headers["x-job-id"] == lost.job_id
    await until_state(api, lost.job_id, "cancelled")
    retry = asyncio.create_task(api.post(headers=headers))
    delivery = await worker.take()
    assert delivery.job_id != lost.job_id
    await worker.finish(delivery, 0)
    assert parse_events((await retry).text)[-1].name == "done"


@pytest.mark.parametrize("changed", [{"question": "Else?"}, {"seed": 3}, {"clip": None}])
async def test_same_key_with_another_request_is_a_409(
    api: RunningApi, worker: ScriptedWorker, changed: dict[str, Any]
) -> None:
    if "clip" in changed:
        upload = await api.client.post("/v1/videos", files={"video": CLIP + b"x"})
        changed = {"clip": None, "video_id": upload.json()["video_id"]}
    headers = {"Idempotency-Key": "k"}
    first = asyncio.create_task(api.post(headers=headers))
    await worker.answer()
    await first
    response = await api.post(headers=headers, **changed)
    assert response.status_code == 409
    assert response.json()["code"] == "idempotency_conflict"


@pytest.mark.parametrize("key", ["", "x" * 256, "a b"])
async def test_malformed_idempotency_key_is_a_400(
    api: RunningApi, worker: ScriptedWorker, key: str
) -> None:
    assert (await api.post(headers={"Idempotency-Key": key})).status_code == 400
