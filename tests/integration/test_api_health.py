"""What is ready, and what an outage of Redis looks like to clients and probes."""

import asyncio
import time
from pathlib import Path

import pytest

from app.api.upkeep.janitor import SWEEP_S
from app.errors import StoreUnavailableError
from app.store.client import connect
from app.store.keys import RedisKeys
from tests.integration.api import (
    RunningApi,
    ScriptedWorker,
    num_workers,
    parse_events,
    running_api,
    scripted_worker,
    until,
)
from tests.integration.conftest import RedisServer


async def test_ready_means_that_a_worker_can_take_a_job(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    assert (await api.client.get("/livez")).status_code == 200
    assert (await api.client.get("/readyz")).status_code == 200
    await worker.withdraw()
    response = await api.client.get("/readyz")
    assert (response.status_code, response.json()["code"]) == (503, "no_worker")
    assert (await api.client.get("/livez")).status_code == 200
    assert (await api.client.get("/v1/models")).json()["data"] == []


async def test_models_are_listed_with_their_workers(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    answer = (await api.client.get("/v1/models")).json()
    assert [(m["id"], m["num_workers"]) for m in answer["data"]] == [("tiny", 1)]
    assert answer["compression"]["default"]["policy"] == "dycoke"
    assert "k" in answer["compression"]["policies"]["dycoke"]


async def test_outage_of_redis_is_a_503_at_once_and_heals_by_itself(
    own_redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> None:
    async with (
        running_api(own_redis_server.url, keys, tmp_path) as api,
        scripted_worker(own_redis_server.url, keys) as worker,
    ):
        post = asyncio.create_task(api.post())
        delivery = await worker.take()
        await worker.say(delivery, 0)
        await until(lambda: is_store_up(api) == 1.0)
        own_redis_server.stop()
        began_at = time.monotonic()
        for method, path in (
            ("GET", "/readyz"),
            ("GET", "/v1/usage"),
            ("GET", f"/v1/jobs/{delivery.job_id}"),
            ("DELETE", f"/v1/jobs/{delivery.job_id}"),
        ):
            response = await api.client.request(method, path)
            assert response.status_code == 503, path
            assert response.json()["code"] == "store_unavailable"
        assert (await api.post()).json()["code"] == "store_unavailable"
        assert time.monotonic() - began_at < 10
        assert (await api.client.get("/livez")).status_code == 200
        await until(lambda: is_store_up(api) == 0.0)
        own_redis_server.start()
        await worker.say(delivery, 1)
        await worker.finish(delivery, 2)
        events = [e for e in parse_events((await post).text) if e.name != "status"]
        assert [e.name for e in events] == ["job", "token", "token", "done"]
        assert (await api.client.get("/readyz")).status_code == 200
        await until(lambda: is_store_up(api) == 1.0)


def is_store_up(api: RunningApi) -> float | None:
    return api.api.metrics.registry.get_sample_value("dycoke_store_up")


async def test_redis_that_never_was_there_is_not_up(keys: RedisKeys, tmp_path: Path) -> None:
    async with running_api("unix:///nonexistent/redis.sock", keys, tmp_path) as api:
        assert is_store_up(api) == 0.0
        await asyncio.sleep(SWEEP_S + 0.5)  # it has looked
        assert is_store_up(api) == 0.0
        assert "dycoke_store_up 0.0" in await api.metrics()


async def test_redis_that_takes_no_writes_is_missed_by_its_workers_or_not_up(
    own_redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> None:
    """Their heartbeats are refused. A full Redis still forgets them, a read-only one does not."""
    redis = connect(own_redis_server.url)
    async with (
        running_api(own_redis_server.url, keys, tmp_path) as api,
        scripted_worker(own_redis_server.url, keys) as worker,
    ):
        await until(lambda: num_workers(api) == 1.0)
        await redis.config_set("maxmemory", 1)
        with pytest.raises(StoreUnavailableError):
            await worker.publish_card()
        await redis.pexpire(keys.worker("worker-tiny"), 1)
        await until(lambda: num_workers(api) == 0.0)
        assert is_store_up(api) == 1.0
        await redis.config_set("maxmemory", 0)
        await worker.publish_card()
        await redis.pexpire(keys.worker("worker-tiny"), 1000)
        await redis.replicaof("127.0.0.1", "1")
        with pytest.raises(StoreUnavailableError):
            await worker.publish_card()
        await until(lambda: is_store_up(api) == 0.0)
        await redis.replicaof("no", "one")
        await until(lambda: is_store_up(api) == 1.0)
    await redis.aclose()
