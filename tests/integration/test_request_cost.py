"""What a question about a video whose frames are stored asks of Redis, and what its stream does."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from app.messages import JobState, StatusEvent
from app.store import event_reader
from app.store.client import connect, load_script
from app.store.event_reader import CONNECTIONS, EventReader
from app.store.job_leases import Append, JobLeases
from app.store.job_queue import JobQueue, JobRecord
from app.store.keys import RedisKeys
from app.store.shared_connection import SharedConnection
from tests.integration.api import RunningApi, ScriptedWorker
from tests.integration.conftest import RedisServer
from tests.integration.jobs import MODEL, cancelled, submit, take, token

OF_THE_API = ("admit", "reserve", "create", "append_status", "pin_frames", "put_frames", "enqueue")
OF_THE_WORKER = ("start", "append")
PATIENCE_S = 30.0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each script, and each other command, was called over a shared connection."""
    counted: Counter[str] = Counter()
    names = {load_script(name)[1]: name for name in (*OF_THE_API, *OF_THE_WORKER)}
    call = SharedConnection.call

    async def counting_call(self: SharedConnection, *args: Any) -> Any:
        is_script = args[0] == "EVALSHA"
        counted[names.get(args[1], "another") if is_script else args[0]] += 1
        return await call(self, *args)

    monkeypatch.setattr(SharedConnection, "call", counting_call)
    return counted


async def test_question_about_stored_frames_is_three_scripts(
    api: RunningApi,
    worker: ScriptedWorker,
    calls: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = asyncio.create_task(api.post())
    video_id = (await worker.answer(1)).request.video_id
    await first
    second = asyncio.create_task(api.post(clip=None, video_id=video_id))  # finds what is stored
    await worker.answer(1)
    await second
    records: list[str] = []
    get = JobQueue.get

    async def counting_get(self: JobQueue, job_id: str) -> JobRecord:
        records.append(job_id)
        return await get(self, job_id)

    monkeypatch.setattr(JobQueue, "get", counting_get)
    calls.clear()
    async with asyncio.timeout(PATIENCE_S):
        post = asyncio.create_task(api.post(clip=None, video_id=video_id))
        delivery = await worker.take()
        records.clear()  # while it waits its place in the queue is looked up by the clock
        assert await worker.say(delivery, 0) and await worker.finish(delivery, 1)
        await post
    asked = {name: calls[name] for name in OF_THE_API if calls[name]}
    assert asked == {"admit": 1, "reserve": 1, "create": 1}
    assert calls["start"] == 1 and calls["append"] == 2
    assert len(records) <= 1  # a look that was under way; none because of what the worker said


async def test_stream_reads_the_log_once(
    redis_server: RedisServer,
    keys: RedisKeys,
    calls: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What comes after that comes with the news of it."""
    monkeypatch.setattr(event_reader, "POLL_S", 3600.0)
    redis = connect(redis_server.url, max_connections=CONNECTIONS)
    queue = JobQueue(redis, keys, result_ttl_s=60)
    leases = JobLeases(redis, keys, model=MODEL, worker_id="w", result_ttl_s=60)
    await leases.ensure_group()
    await submit(queue, "j")
    delivery = await take(leases)
    reader = EventReader(redis, keys)
    running = asyncio.create_task(reader.run())
    status, encoding = StatusEvent(stage="prefilling"), StatusEvent(stage="encoding")
    said = [[encoding], [status, token(0)], [token(1)]]
    with reader.watch("j") as watch:
        async with asyncio.timeout(PATIENCE_S):
            (opening,) = await watch.next(after="0-0", timeout_s=PATIENCE_S)
            await _until_it_listens(redis, keys)
            assert await watch.next(after=opening.id, timeout_s=0) == []
            calls.clear()
            seen, after = [], opening.id
            for events in (*said, []):
                final = None if events else cancelled("j")
                following = asyncio.create_task(watch.next(after=after, timeout_s=PATIENCE_S))
                await asyncio.sleep(0)
                await leases.append([Append(delivery, events, final)])
                came = await following
                after = came[-1].id
                seen.append([logged.event for logged in came])
    assert seen == [*said, [cancelled("j")]]
    assert calls["XREAD"] == 0
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert (await queue.get("j")).state is JobState.ERROR
    await redis.aclose()


async def _until_it_listens(redis: Any, keys: RedisKeys) -> None:
    while not dict(await redis.pubsub_numsub(keys.news)).get(keys.news.encode()):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)  # for the confirmation, which has every log read once
