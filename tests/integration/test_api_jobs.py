"""Jobs after their post: resuming, several readers, cancelling, disconnects, idempotency."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from app.store.keys import RedisKeys
from tests.integration.api import (
    EventReader,
    RunningApi,
    ScriptedWorker,
    parse_events,
    running_api,
    until,
    until_state,
)
from tests.integration.conftest import RedisServer


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
    """Of a long answer only the last event is read: what comes before need not even be one."""
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
