"""Limits of a key over HTTP: 429s that say what is left and when to come back."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis

from app.__main__ import main
from app.api import auth
from app.api.upkeep import janitor
from app.store.keys import RedisKeys
from tests.integration.api import RunningApi, ScriptedWorker, running_api, until
from tests.integration.api_keys import KEYS, A, B
from tests.integration.conftest import AddKey, RedisServer
from tests.integration.lua_clock import LuaClock

pytestmark = pytest.mark.usefixtures("clock")

TOKENS_OF_A_POST = 2 * 4 + len("What happens?") // 4 + 90


@pytest.fixture
async def api(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, clock: LuaClock
) -> AsyncIterator[RunningApi]:
    async with running_api(
        redis_server.url,
        keys,
        tmp_path,
        api_keys=KEYS,
        public_metrics=False,
        key_max_jobs=2,
        key_tokens_per_minute=120,
    ) as api:
        yield api


async def post(api: RunningApi, headers: dict[str, str]) -> httpx.Response:
    return await api.post(headers=headers, stream=False, max_tokens=90, num_frames=2)


async def ask(api: RunningApi, worker: ScriptedWorker, headers: dict[str, str]) -> httpx.Response:
    posted = asyncio.create_task(post(api, headers))
    await worker.answer()
    return await posted


async def post_nothing(api: RunningApi, headers: dict[str, str]) -> httpx.Response:
    return await api.client.post("/v1/video/chat", headers=headers, json={})


async def test_answers_and_refusals_say_how_a_key_stands(
    api: RunningApi, worker: ScriptedWorker, clock: LuaClock
) -> None:
    answered = await ask(api, worker, A)
    assert answered.status_code == 200
    assert answered.headers["ratelimit-policy"] == (
        '"jobs";q=2;qu="concurrent-requests", "tokens";q=120;qu="tokens";w=60'
    )
    left = 120 - TOKENS_OF_A_POST
    assert answered.headers["ratelimit"] == f'"jobs";r=1, "tokens";r={left};t=1'

    # The first one has ended and used less than was taken: 97 are left, one more post wants 101.
    refused = await post(api, A)
    assert refused.status_code == 429
    problem = refused.json()
    assert (problem["code"], problem["retryable"]) == ("key_limit_exceeded", True)
    assert "may have 120 tokens a minute" in problem["detail"]
    assert refused.headers["retry-after"] == "2"
    assert refused.headers["ratelimit"] == '"jobs";r=2, "tokens";r=97;t=2'
    assert "ratelimit-policy" in refused.headers

    asked = {"clip": None, "video_id": problem["video_id"], "max_tokens": 90, "num_frames": 2}
    assert (await api.post(headers=A, stream=False, **asked)).status_code == 429
    assert (await ask(api, worker, B)).status_code == 200, "the other key's bucket is its own"
    await clock.advance(2)
    posted = asyncio.create_task(api.post(headers=A, stream=False, **asked))
    await worker.answer()
    assert (await posted).status_code == 200

    metrics = (await api.client.get("/metrics", headers=B)).text
    assert metrics.startswith("{"), "a key without that scope"


async def test_a_key_at_its_limit_is_refused_at_the_headers(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    api.readers.may_read.clear()
    ask_little = {"headers": A, "stream": False, "max_tokens": 8, "num_frames": 2}
    posts = [asyncio.create_task(api.post(**ask_little)) for _ in range(2)]
    await until(lambda: api.readers.num_reads)
    async with asyncio.timeout(20):
        while (
            refused := await api.client.post("/v1/video/chat", headers=A, json={})
        ).status_code != 429:
            await asyncio.sleep(0.02)
    assert refused.json()["code"] == "key_limit_exceeded"
    assert int(refused.headers["retry-after"]) >= 1
    completion = await api.client.post("/v1/chat/completions", headers=A, json={"messages": []})
    assert completion.status_code == 429
    error = completion.json()["error"]
    assert (error["code"], error["type"]) == ("key_limit_exceeded", "rate_limit_error")
    assert completion.headers["x-should-retry"] == "true"
    assert "r=0" in completion.headers["ratelimit"]
    api.readers.may_read.set()
    for _ in posts:
        await worker.answer()
    assert [(await posted).status_code for posted in posts] == [200, 200]


async def test_only_a_retry_that_may_find_its_job_is_let_in_over_the_limit(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    little = {"max_tokens": 8, "num_frames": 2}
    known, new = (A | {"Idempotency-Key": key} for key in ("known", "new"))
    async with api.posting(headers=known, **little), api.posting(headers=A, **little):
        refused = await post_nothing(api, new)
        assert (refused.status_code, refused.json()["code"]) == (429, "key_limit_exceeded")
        assert (await post_nothing(api, known)).status_code == 400, "its body is read"
        others = await post_nothing(api, B | {"Idempotency-Key": "known"})
        assert others.status_code == 400, "another key is not at its limit"
    async with asyncio.timeout(20):
        while (await post_nothing(api, A)).status_code == 429:
            await asyncio.sleep(0.02)


async def test_client_that_leaves_gives_its_place_back(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    little = {"max_tokens": 8, "num_frames": 2}
    async with api.posting(headers=A, **little), api.posting(headers=A, **little):
        assert (await api.post(headers=A, stream=False, **little)).status_code == 429
    async with asyncio.timeout(20):
        while (await post_nothing(api, A)).status_code == 429:
            await asyncio.sleep(0.02)


async def test_key_that_fills_the_queue_keeps_no_other_key_out(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, worker: ScriptedWorker
) -> None:
    """Neither at the headers nor when the place is taken; no key has a limit of its own."""
    settings = {"api_keys": KEYS, "max_queued_jobs": 2}
    async with running_api(redis_server.url, keys, tmp_path, **settings) as api:
        posts = [asyncio.create_task(api.post(headers=A, stream=False)) for _ in range(2)]
        async with asyncio.timeout(20):
            while (refused := await post_nothing(api, A)).status_code != 429:
                await asyncio.sleep(0.02)
        assert refused.json()["code"] == "queue_full"
        assert (await post_nothing(api, B)).status_code == 400, "it is let in, and says nothing"
        posts.append(asyncio.create_task(api.post(headers=B, stream=False)))
        owners = {(await worker.answer()).request.owner for _ in posts}
        assert [(await posted).status_code for posted in posts] == [200] * 3
        assert len(owners) == 2


async def test_jobs_that_ended_unnoticed_are_pruned_in_the_background(
    redis_server: RedisServer,
    redis: Redis,
    keys: RedisKeys,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(janitor, "TIDY_S", 0.05)
    async with running_api(redis_server.url, keys, tmp_path, api_keys=KEYS) as api:
        (owner, *_) = (holder.owner for holder in api.api.keys.holders)
        await redis.zadd(keys.owner_jobs(owner), {"ended": 0})
        async with asyncio.timeout(20):
            while await redis.exists(keys.owner_jobs(owner)):
                await asyncio.sleep(0.02)


async def test_stored_key_has_limits_of_its_own_and_they_change_without_a_restart(
    redis_server: RedisServer,
    keys: RedisKeys,
    tmp_path: Path,
    worker: ScriptedWorker,
    clock: LuaClock,
    monkeypatch: pytest.MonkeyPatch,
    add_key: AddKey,
) -> None:
    monkeypatch.setattr(auth, "REFRESH_S", 0.05)
    words = ["--scopes", "ask,upload,metrics", "--max-jobs", "0", "--frames-per-minute", "9"]
    carol = add_key("carol", *words)
    async with running_api(
        redis_server.url, keys, tmp_path, key_max_jobs=1, public_metrics=False
    ) as api:
        assert (await ask(api, worker, carol)).headers["ratelimit"] == '"frames";r=7;t=7'
        for _ in range(3):
            await ask(api, worker, carol)
        assert (await post(api, carol)).status_code == 429
        assert main(["keys", "limit", "carol", "--frames-per-minute", "60"]) == 0
        await clock.advance(1)  # brings one frame by the new limit; by the old, none
        answered = asyncio.create_task(worker.answer())
        async with asyncio.timeout(20):
            while (reply := await post(api, carol)).status_code == 429:
                await asyncio.sleep(0.02)
        await answered
        assert "q=60" in reply.headers["ratelimit-policy"]
        page = (await api.client.get("/metrics", headers=carol)).text
        assert 'dycoke_key_refusals_total{process="0",key="carol",limit="frames"}' in page
        async with asyncio.timeout(20):
            while 'key="carol",state="waiting"} 0.0' not in page:
                await asyncio.sleep(0.05)
                page = (await api.client.get("/metrics", headers=carol)).text


@pytest.mark.parametrize("is_limited", [False, True])
async def test_who_has_no_key_is_limited_only_where_the_operator_says_so(
    is_limited: bool,
    redis_server: RedisServer,
    keys: RedisKeys,
    tmp_path: Path,
    worker: ScriptedWorker,
) -> None:
    async with running_api(
        redis_server.url, keys, tmp_path, key_tokens_per_minute=10, limit_anonymous=is_limited
    ) as api:
        assert ("ratelimit" in (await ask(api, worker, {})).headers) == is_limited
        if is_limited:
            assert (await post(api, {})).json()["code"] == "key_limit_exceeded"
        page = await api.metrics()
        assert ('dycoke_key_refusals_total{key="any",limit="tokens"} 1.0' in page) == is_limited
