"""`kept_mask` in the receipt and `/v1/jobs/{id}/kept`: stored with the job, fenced, and gone with
it."""

import asyncio
import base64
from collections.abc import AsyncIterator
from hashlib import sha1
from typing import Any

import numpy as np
import pytest
from redis.asyncio import Redis

from app.messages import DoneEvent, JobState
from app.settings import Settings
from app.store.client import load_script
from app.store.job_queue import JobQueue
from app.store.kept_sets import KeptSets
from app.store.keys import RedisKeys
from dycoke_core.kept_sets import KeptHistory, KeptRecorder
from tests.integration.api import (
    CLIP,
    MODEL,
    RunningApi,
    ScriptedWorker,
    receipt,
    until_state,
)
from tests.integration.conftest import RedisServer
from tests.integration.jobs import cancelled, leases_of, submit, take, take_over
from tests.integration.workers import Client, client_of, running

HISTORY_OF_TOKENS = 4


def history(*, num_stored: int | None = None) -> KeptHistory:
    """Of 2 x 2 tokens the first, second and fourth go in; each step keeps two of them."""
    recorder = KeptRecorder(units=1, rows=2, columns=2, kept=np.array([0, 1, 3]))
    for token in range(1, HISTORY_OF_TOKENS):
        recorder.add(token, np.delete(np.arange(3), token % 3))
    made = recorder.history(HISTORY_OF_TOKENS)
    if num_stored is not None:
        object.__setattr__(made, "num_stored", num_stored)
    return made


def bits(text: str | None) -> str:
    assert text is not None
    (byte,) = base64.b64decode(text)
    return f"{byte:08b}"


# --- the store ---


@pytest.fixture
def sets(redis: Redis, keys: RedisKeys) -> KeptSets:
    return KeptSets(redis, keys)


async def test_sets_live_as_long_as_the_job_and_count_among_its_bytes(
    redis: Redis, keys: RedisKeys, queue: JobQueue, sets: KeptSets
) -> None:
    leases = leases_of(redis, keys, "a")
    await leases.ensure_group()
    sizes = {}
    for job_id, blob in (("with", b"x" * 50_000), ("without", None)):
        await submit(queue, job_id)
        delivery = await take(leases)
        if blob is not None:
            assert await sets.put(delivery, blob)
        assert await queue.end(job_id, JobState.CANCELLED, cancelled(job_id))
        sizes[job_id] = int(await redis.hget(keys.ended_sizes, job_id) or 0)
    assert await sets.get("with") == b"x" * 50_000 and await sets.get("without") is None
    assert 50_000 < sizes["with"] - sizes["without"] < 60_000 + 4096
    ttl_of_job_ms = await redis.pttl(keys.job("with"))
    assert 0 < await redis.pttl(keys.kept("with")) <= ttl_of_job_ms + 100


async def test_sets_go_with_the_job_that_makes_room_for_newer_ones(
    redis: Redis, keys: RedisKeys, queue: JobQueue, sets: KeptSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = "MAX_ENDED_BYTES = 256 * 1024 * 1024"

    def load_small(name: str) -> tuple[str, str]:
        source, _ = load_script(name)
        assert budget in source or name not in ("append", "end")
        source = source.replace(budget, "MAX_ENDED_BYTES = 150000")
        return source, sha1(source.encode(), usedforsecurity=False).hexdigest()

    monkeypatch.setattr("app.store.client.load_script", load_small)
    leases = leases_of(redis, keys, "a")
    await leases.ensure_group()
    for job_id in "abc":
        await submit(queue, job_id)
        assert await sets.put(await take(leases), b"x" * 60_000)
        assert await queue.end(job_id, JobState.CANCELLED, cancelled(job_id))
    left = [job_id for job_id in "abc" if await sets.get(job_id) is not None]
    assert (
        left == [job_id for job_id in "abc" if await redis.exists(keys.job(job_id))] == ["b", "c"]
    )


async def test_a_worker_whose_lease_is_another_ones_stores_nothing(
    redis: Redis, keys: RedisKeys, queue: JobQueue, sets: KeptSets
) -> None:
    first, second = leases_of(redis, keys, "a"), leases_of(redis, keys, "b")
    await first.ensure_group()
    await submit(queue, "job")
    lost = await take(first)
    held = await take_over(second)
    assert await sets.put(held, b"held")
    assert not await sets.put(lost, b"lost")
    assert await sets.get("job") == b"held"
    await queue.end("job", JobState.CANCELLED, cancelled("job"))
    assert not await sets.put(held, b"late")


async def test_what_redis_cannot_store_fails_nobody(
    redis: Redis, keys: RedisKeys, queue: JobQueue, sets: KeptSets
) -> None:
    leases = leases_of(redis, keys, "a")
    await leases.ensure_group()
    await submit(queue, "job")
    delivery = await take(leases)
    await redis.delete(keys.job("job"))
    await redis.set(keys.job("job"), "no hash")
    assert not await sets.put(delivery, b"x")


# --- the worker ---


@pytest.fixture
def settings(redis_server: RedisServer, keys: RedisKeys) -> Settings:
    return Settings(
        redis_url=redis_server.url, redis_prefix=keys.prefix, lease_s=0.6, drain_timeout_s=20
    )


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[Client]:
    async with client_of(settings) as client:
        yield client


async def test_the_worker_stores_what_was_kept_before_it_ends_the_job(
    settings: Settings, client: Client, sets: KeptSets
) -> None:
    async with running(settings):
        asked = await client.ask("why?", max_tokens=HISTORY_OF_TOKENS, kept_mask=True)
        not_asked = await client.ask("why?", max_tokens=HISTORY_OF_TOKENS)
        done = [(await client.events(job_id))[-1] for job_id in (asked, not_asked)]
    assert all(isinstance(event, DoneEvent) for event in done)
    blob = await sets.get(asked)
    assert blob is not None and KeptHistory.decode(blob) == history()
    assert await sets.get(not_asked) is None
    mask, none = (event.kept_mask for event in done if isinstance(event, DoneEvent))
    assert none is None and mask is not None
    assert (mask.units, mask.tokens_per_unit, mask.rows, mask.columns) == (1, 4, 2, 2)
    assert bits(mask.stage1) == "11010000" and bits(mask.stage2) == "01010000"


async def test_an_answer_that_is_resumed_has_the_sets_of_all_its_tokens(
    settings: Settings, client: Client, sets: KeptSets
) -> None:
    async with running(settings, "worker-a") as first:
        job_id = await client.ask("sleep:0.2 why?", max_tokens=HISTORY_OF_TOKENS, kept_mask=True)
        await client.wait_for_token(job_id, 1)
        first.task.cancel()
        await asyncio.gather(first.task, return_exceptions=True)
    async with running(settings, "worker-b"):
        done = (await client.events(job_id))[-1]
    assert isinstance(done, DoneEvent) and done.attempts == 2
    blob = await sets.get(job_id)
    assert blob is not None and KeptHistory.decode(blob) == history()


# --- the routes ---


async def ask(api: RunningApi, **fields: Any) -> str:
    job = await api.client.post("/v1/videos", files={"video": CLIP})
    body = {"question": "Why?", "video_id": job.json()["video_id"], "on_disconnect": "continue"}
    async with api.client.stream("POST", "/v1/video/chat", json={**body, **fields}) as response:
        assert response.status_code == 200
        return response.headers["x-job-id"]


async def finished(api: RunningApi, worker: ScriptedWorker, made: KeptHistory | None) -> str:
    job_id = await ask(api, kept_mask=True)
    delivery = await worker.take()
    assert delivery.request.kept_mask
    if made is not None:
        assert await KeptSets(worker._redis, worker._keys).put(delivery, made.encode())
    assert await worker.say(delivery, *range(HISTORY_OF_TOKENS))
    assert await worker.finish(delivery, HISTORY_OF_TOKENS)
    await until_state(api, job_id, "done")
    return job_id


async def kept(api: RunningApi, job_id: str, token: object = 1) -> tuple[int, dict[str, Any]]:
    response = await api.client.get(f"/v1/jobs/{job_id}/kept", params={"token": token})
    return response.status_code, response.json()


async def test_each_tokens_sets_can_be_read(api: RunningApi, worker: ScriptedWorker) -> None:
    job_id = await finished(api, worker, history())
    expected = [None, "10010000", "11000000", "01010000"]
    for token, stage_two in enumerate(expected):
        status, body = await kept(api, job_id, token)
        assert status == 200
        assert body.pop("stage2") == (stage_two and body_of(stage_two))
        assert body == {
            "token": token,
            "units": 1,
            "tokens_per_unit": 4,
            "rows": 2,
            "columns": 2,
            "stage1": body_of("11010000"),
            "truncated": False,
            "stored_tokens": HISTORY_OF_TOKENS,
        }


def body_of(byte: str) -> str:
    return base64.b64encode(bytes([int(byte, 2)])).decode()


async def test_a_truncated_history_says_so(api: RunningApi, worker: ScriptedWorker) -> None:
    job_id = await finished(api, worker, history(num_stored=2))
    status, body = await kept(api, job_id, 1)
    assert (status, body["truncated"], body["stored_tokens"]) == (200, True, 2)
    status, body = await kept(api, job_id, 2)
    assert (status, body["code"], body["retryable"]) == (404, "kept_truncated", False)


async def test_errors_name_what_is_wrong(api: RunningApi, worker: ScriptedWorker) -> None:
    job_id = await finished(api, worker, history())
    for token in (HISTORY_OF_TOKENS, -1, "x"):
        status, body = await kept(api, job_id, token)
        assert (status, body["code"]) == (400, "invalid_request")
        assert body["errors"][0]["field"].endswith("token")
    assert (await kept(api, "job_none"))[1]["code"] == "job_not_found"
    lost = await finished(api, worker, None)
    status, body = await kept(api, lost)
    assert (status, body["code"]) == (404, "kept_not_found")


async def test_a_job_that_did_not_ask_and_one_that_is_not_done_have_none(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    unasked, asked = await ask(api), await ask(api, kept_mask=True)
    assert (await kept(api, unasked))[1]["code"] == "kept_not_found"
    status, body = await kept(api, asked)
    assert (status, body["code"], body["retryable"]) == (409, "job_not_done", True)
    for _ in range(2):
        await worker.answer(2)
    await until_state(api, unasked, "done")
    assert (await kept(api, unasked))[1]["code"] == "kept_not_found"


async def test_a_form_and_a_chat_completion_may_ask_too(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    async with api.posting(kept_mask="true") as response:
        delivery = await worker.take()
        assert delivery.request.kept_mask and response.status_code == 200
        await worker.say(delivery, 0)
        await worker.finish(delivery, 1)
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hello?"}],
        "kept_mask": True,
    }
    answering = asyncio.create_task(worker.answer(1))
    answer = (await api.client.post("/v1/chat/completions", json=body)).json()
    assert not (await answering).request.kept_mask  # there is no video
    assert answer["dycoke"]["kept_mask"] is None
    assert answer["dycoke"]["warnings"] == [
        "kept_mask: without effect on a conversation without a video"
    ]


async def test_a_retry_that_asks_otherwise_is_another_request(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    headers = {"Idempotency-Key": "one"}
    async with api.posting(headers=headers, on_disconnect="continue") as response:
        assert response.status_code == 200
    again = await api.client.post(
        "/v1/video/chat",
        headers=headers,
        data={"question": "What happens?", "on_disconnect": "continue", "kept_mask": "true"},
        files={"video": CLIP},
    )
    assert (again.status_code, again.json()["code"]) == (409, "idempotency_conflict")
    delivery = await worker.take()
    assert receipt(delivery, 1).kept_mask is None
