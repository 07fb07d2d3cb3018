"""Jobs after their post: resuming, several readers, cancelling, disconnects, idempotency."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from app.errors import StoreUnavailableError
from app.store.client import connect
from app.store.keys import RedisKeys
from tests.integration.api import (
    CLIP,
    PATIENCE_S,
    EventReader,
    RunningApi,
    ScriptedWorker,
    parse_events,
    running_api,
    scripted_worker,
    until,
    until_state,
)
from tests.integration.conftest import RedisServer
from tests.integration.workers import wait_until


@pytest.fixture
async def api(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> AsyncIterator[RunningApi]:
    async with running_api(redis_server.url, keys, tmp_path, heartbeat_s=0.3) as api:
        yield api


# --- reading ---


async def test_stream_resumes_behind_the_last_event_seen(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    async with api.posting(on_disconnect="continue") as response:
        job_id = response.headers["x-job-id"]
        reader = EventReader(response)
        delivery = await worker.take()
        await worker.status(delivery, "prefilling", 0.5)
        await worker.say(delivery, 0, 1)
        seen = await reader.until("token", index=1)
    await worker.say(delivery, 2)
    async with api.client.stream(
        "GET", f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": seen.id or ""}
    ) as response:
        assert response.headers["x-job-id"] == job_id
        reader = EventReader(response)
        resumed = [await reader.next()]
        await worker.say(delivery, 3)
        await worker.finish(delivery, 4)
        resumed += await reader.rest()
    named = [(e.name, e.data.get("index")) for e in resumed if e is not None]
    assert named == [("token", 2), ("token", 3), ("done", None)]


async def test_whole_stream_is_replayed_without_stale_statuses(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    post = asyncio.create_task(api.post())
    delivery = await worker.take()
    await worker.status(delivery, "encoding", 0.0)
    await worker.say(delivery, 0)
    await worker.finish(delivery, 1)
    lived = parse_events((await post).text)
    replay = await api.client.get(f"/v1/jobs/{delivery.job_id}/events")
    replayed = parse_events(replay.text)
    assert [e.name for e in replayed] == ["job", "token", "done"]
    assert replayed == [e for e in lived if e.name != "status"]


async def test_status_shows_where_a_running_job_is(api: RunningApi, worker: ScriptedWorker) -> None:
    async with api.posting() as posted:
        delivery = await worker.take()
        await worker.say(delivery, 0)
        await worker.status(delivery, "encoding", 0.0)
        await worker.status(delivery, "prefilling", 0.25)
        async with api.client.stream("GET", f"/v1/jobs/{delivery.job_id}/events") as response:
            reader = EventReader(response)
            events = [await reader.next() for _ in range(3)]
        assert [e.name for e in events if e] == ["job", "token", "status"]
        assert events[2] is not None and events[2].data["stage"] == "prefilling"
        await worker.finish(delivery, 1)
        await posted.aread()


async def test_reading_behind_the_end_says_there_is_nothing_more(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    post = asyncio.create_task(api.post())
    delivery = await worker.answer()
    done = parse_events((await post).text)[-1]
    response = await api.client.get(
        f"/v1/jobs/{delivery.job_id}/events", headers={"Last-Event-ID": done.id or ""}
    )
    assert response.status_code == 204


async def test_malformed_last_event_id_is_a_400(api: RunningApi, worker: ScriptedWorker) -> None:
    post = asyncio.create_task(api.post())
    delivery = await worker.answer()
    await post
    for event_id in ("x", "0", "1-2-3", "-", "$", "99999999999999999999-0"):
        response = await api.client.get(
            f"/v1/jobs/{delivery.job_id}/events", headers={"Last-Event-ID": event_id}
        )
        assert response.status_code == 400, event_id


async def test_readers_of_one_job_all_get_everything_and_cancel_nothing(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    async with api.posting() as posted:
        url = f"/v1/jobs/{posted.headers['x-job-id']}/events"
        delivery = await worker.take()
        async with api.client.stream("GET", url) as leaving:
            reader = EventReader(leaving)
            await reader.until("job")
        second = asyncio.create_task(api.client.get(url))
        for index in range(4):
            assert await worker.say(delivery, index)
        await worker.finish(delivery, 4)
        first_text = (await posted.aread()).decode()
    first = [e for e in parse_events(first_text) if e.name != "status"]
    assert [e for e in parse_events((await second).text) if e.name != "status"] == first
    assert [e.name for e in first] == ["job", *["token"] * 4, "done"]


async def test_quiet_stream_sends_heartbeats(api: RunningApi, worker: ScriptedWorker) -> None:
    async with api.posting() as response:
        delivery = await worker.take()
        reader = EventReader(response)
        rest = asyncio.create_task(reader.rest())
        await until(lambda: len(reader.comments) >= 2)
        await worker.finish(delivery, 0)
        assert (await rest)[-1].name == "done"


async def test_position_in_the_queue_is_told_as_it_changes(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    async with api.posting(question="first?") as first:
        await until_state(api, first.headers["x-job-id"], "queued")
        async with api.posting(question="second?") as second:
            reader = EventReader(second)
            await reader.until("status", stage="queued", position=1)
            job = await until_state(api, second.headers["x-job-id"], "queued")
            assert job["position"] == 1
            await worker.answer()
            await reader.until("status", stage="queued", position=0)
            await worker.answer()
            await reader.until("done")
        await first.aread()


async def test_job_tells_how_it_stands_and_ended(api: RunningApi, worker: ScriptedWorker) -> None:
    post = asyncio.create_task(api.post(stream=False, on_disconnect="continue"))
    delivery = await worker.take()
    job = (await api.client.get(f"/v1/jobs/{delivery.job_id}")).json()
    assert (job["state"], job["attempts"], job["result"]) == ("running", 1, None)
    await worker.finish(delivery, 0)
    receipt = (await post).json()
    job = (await api.client.get(f"/v1/jobs/{delivery.job_id}")).json()
    assert (job["state"], job["result"], job["error"]) == ("done", receipt, None)


async def test_state_of_an_ended_job_is_its_last_event_alone(
    api: RunningApi, worker: ScriptedWorker, redis: Redis, keys: RedisKeys
) -> None:
    """Of a long answer nothing else is read: what lies before it need not even be an event."""
    post = asyncio.create_task(api.post(stream=False))
    delivery = await worker.answer(3)
    receipt = (await post).json()
    events = keys.events(delivery.job_id)
    ((last_id, last),) = await redis.xrevrange(events, count=1)
    await redis.delete(events)
    await redis.xadd(events, {"event": "not read"}, id="0-1")
    await redis.xadd(events, last, id=last_id)
    for method in ("GET", "DELETE"):
        job = await api.client.request(method, f"/v1/jobs/{delivery.job_id}")
        assert (job.status_code, job.json()["result"]) == (200, receipt)
    await redis.delete(events)
    lost = (await api.client.get(f"/v1/jobs/{delivery.job_id}")).json()
    assert (lost["result"], lost["error"]["code"]) == (None, "job_lost")


@pytest.mark.parametrize("job_id", ["job_" + "0" * 32, "..", "x:y", "a" * 300])
async def test_unknown_job_is_a_404(api: RunningApi, job_id: str) -> None:
    for method, suffix in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
        response = await api.client.request(method, f"/v1/jobs/{job_id}{suffix}")
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"


# --- cancelling ---


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


# --- disconnects ---


async def test_closing_while_uploading_frees_the_disk_and_has_held_no_place(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", api.port)
    boundary = "b"
    body = (
        (
            f'--{boundary}\r\ncontent-disposition: form-data; name="video"; filename="x"\r\n\r\n'
        ).encode()
        + b"\x00\x00\x00\x18ftypmp42"
        + bytes(3 * 2**20)
    )
    writer.write(
        b"POST /v1/video/chat HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999\r\n"
        b"content-type: multipart/form-data; boundary=b\r\n\r\n" + body
    )
    await writer.drain()
    await until(lambda: any(p.stat().st_size for p in incoming(api)))
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0
    writer.close()
    await until(lambda: incoming(api) == [])
    assert api.api.videos._room.used_bytes == 0


async def test_closing_while_probing_kills_the_probe(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    api.readers.may_probe.clear()
    post = asyncio.create_task(api.post(on_disconnect="continue"))
    await until(lambda: api.readers.num_probes == 1)
    post.cancel()
    await until(lambda: api.readers.num_cancelled == 1)
    await until(lambda: incoming(api) == [])
    async with asyncio.timeout(PATIENCE_S):
        while (await api.api.jobs.queue.depth("tiny")).waiting:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
async def test_closing_while_frames_are_read_cancels_the_job(
    api: RunningApi, worker: ScriptedWorker, stream: bool
) -> None:
    api.readers.may_read.clear()
    post = asyncio.create_task(api.post(stream=stream))
    await until(lambda: api.readers.num_reads == 1)
    job_id = await only_job(api)
    post.cancel()
    job = await until_state(api, job_id, "cancelled")
    assert job["error"]["code"] == "cancelled"
    await until(lambda: api.readers.num_cancelled == 1)


@pytest.mark.parametrize("stream", [True, False])
async def test_closing_while_queued_cancels_the_job(
    api: RunningApi, worker: ScriptedWorker, stream: bool
) -> None:
    post = asyncio.create_task(api.post(stream=stream))
    await until(lambda: api.readers.num_reads == 1)
    job_id = await only_job(api)
    await until_state(api, job_id, "queued")
    post.cancel()
    await until_state(api, job_id, "cancelled")


@pytest.mark.parametrize("stream", [True, False])
async def test_closing_while_running_cancels_the_job(
    api: RunningApi, worker: ScriptedWorker, stream: bool
) -> None:
    post = asyncio.create_task(api.post(stream=stream))
    delivery = await worker.take()
    assert await worker.say(delivery, 0)
    post.cancel()
    await until_state(api, delivery.job_id, "cancelled")
    assert not await worker.say(delivery, 1)
    metrics = await api.metrics()
    assert "dycoke_client_disconnects_total 1.0" in metrics


async def test_resetting_the_connection_cancels_the_job(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    """A client that dies sends a reset, not an orderly close."""
    upload = await api.client.post("/v1/videos", files={"video": CLIP})
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    body = f'{{"question": "x", "video_id": "{upload.json()["video_id"]}"}}'.encode()
    writer.write(
        b"POST /v1/video/chat HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(body) + body
    )
    await reader.readuntil(b"event: job")
    delivery = await worker.take()
    writer.transport.abort()
    await until_state(api, delivery.job_id, "cancelled")


@pytest.mark.parametrize("stream", [True, False])
async def test_job_goes_on_without_its_client_if_asked_to(
    api: RunningApi, worker: ScriptedWorker, stream: bool
) -> None:
    api.readers.may_read.clear()
    post = asyncio.create_task(api.post(stream=stream, on_disconnect="continue"))
    await until(lambda: api.readers.num_reads == 1)
    job_id = await only_job(api)
    post.cancel()
    await asyncio.sleep(0.3)
    api.readers.may_read.set()
    await worker.answer(3)
    job = await until_state(api, job_id, "done")
    assert job["result"]["text"] == "t0 t1 t2 "

    async def is_observed() -> bool:
        labels = 'model="tiny",outcome="done",policy="dycoke",requested="fixed"'
        return f"dycoke_requests_total{{{labels}}} 1.0" in await api.metrics()

    async with asyncio.timeout(10):
        while not await is_observed():
            await asyncio.sleep(0.05)


async def test_cancel_by_disconnect_waits_for_redis(
    own_redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> None:
    async with (
        running_api(own_redis_server.url, keys, tmp_path) as api,
        scripted_worker(own_redis_server.url, keys) as worker,
    ):
        post = asyncio.create_task(api.post())
        delivery = await worker.take()
        own_redis_server.stop()
        post.cancel()
        await asyncio.sleep(0.5)
        own_redis_server.start()

        async def state() -> str:
            try:
                return str((await api.api.jobs.queue.get(delivery.job_id)).state)
            except StoreUnavailableError:
                return "unknown"

        async with asyncio.timeout(20):
            while await state() != "cancelled":
                await asyncio.sleep(0.1)


# --- idempotency ---


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
    """A cancelled job stands for its key no longer; one that is done does."""
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


def incoming(api: RunningApi) -> list[Path]:
    return list((api.settings.data_dir / "videos" / "incoming").iterdir())


async def only_job(api: RunningApi) -> str:
    keys = RedisKeys(api.settings.redis_prefix)
    redis = connect(api.settings.redis_url or "")
    (job_id,) = await redis.zrange(keys.live, 0, -1)
    await redis.aclose()
    return str(job_id.decode())
