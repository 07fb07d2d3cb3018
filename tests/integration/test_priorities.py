"""Priorities over HTTP: from the request to the job, its place in the queue, and the receipt."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.__main__ import main
from app.store.keys import RedisKeys
from tests.integration.api import CLIP, RunningApi, ScriptedWorker, running_api
from tests.integration.api_keys import bearer
from tests.integration.conftest import AddKey, RedisServer
from tests.integration.openai_client import PATH, hello

SECRET = "key-of-alice-" + "x" * 32
ALICE = bearer(SECRET)


@pytest.fixture
async def capped(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> AsyncIterator[RunningApi]:
    """An API whose keys may ask for normal priority at most."""
    async with running_api(
        redis_server.url, keys, tmp_path, api_keys=f"alice:{SECRET}", key_max_priority="normal"
    ) as api:
        yield api


async def queued(api: RunningApi, fields: dict[str, Any]) -> str:
    """Posts a question whose job outlives the connection; returns its id."""
    async with api.posting(on_disconnect="continue", **fields) as response:
        assert response.status_code == 200
        job_id = response.headers["x-job-id"]
    async with asyncio.timeout(20):
        while (await job(api, job_id))["state"] != "queued":
            await asyncio.sleep(0.02)
    return str(job_id)


async def job(api: RunningApi, job_id: str, headers: dict[str, str] | None = None) -> Any:
    return (await api.client.get(f"/v1/jobs/{job_id}", headers=headers)).json()


@pytest.mark.parametrize("clip", [CLIP, None], ids=["form", "json"])
async def test_a_priority_reaches_the_job_and_the_receipt(
    api: RunningApi, worker: ScriptedWorker, clip: bytes | None
) -> None:
    upload = await api.client.post("/v1/videos", files={"video": CLIP})
    fields = {} if clip else {"video_id": upload.json()["video_id"]}
    posting = asyncio.create_task(api.post(clip=clip, stream=False, priority="high", **fields))
    delivery = await worker.answer()
    assert delivery.request.priority == "high"
    receipt = (await posting).json()
    assert (receipt["priority"], receipt["warnings"]) == ("high", [])
    assert (await job(api, delivery.job_id))["priority"] == "high"


async def test_a_chat_completion_has_a_priority_too(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    answering = asyncio.create_task(worker.answer(1))
    body = {"messages": hello(), "priority": "low"}
    response = await api.client.post(PATH, json=body)
    assert (await answering).request.priority == "low"
    assert response.json()["dycoke"]["priority"] == "low"
    answering = asyncio.create_task(worker.answer(1))
    response = await api.client.post(PATH, json={"messages": hello(), "priority": None})
    assert (await answering).request.priority == "normal"
    assert response.json()["dycoke"]["warnings"] == []


async def test_jobs_are_taken_by_priority_and_clients_are_told_their_places(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    low = await queued(api, {"priority": "low"})
    assert (await job(api, low))["position"] == 0
    normal = await queued(api, {})
    high = await queued(api, {"priority": "high"})
    places = [(await job(api, job_id))["position"] for job_id in (low, normal, high)]
    assert places == [2, 1, 0]
    assert [(await worker.answer()).job_id for _ in range(3)] == [high, normal, low]


async def test_above_its_highest_priority_a_key_gets_that_and_is_told(
    capped: RunningApi, worker: ScriptedWorker
) -> None:
    for asked, had, warnings in (
        ("high", "normal", ["priority high lowered to normal, this key's maximum"]),
        ("normal", "normal", []),
        ("low", "low", []),
    ):
        posting = asyncio.create_task(capped.post(headers=ALICE, stream=False, priority=asked))
        delivery = await worker.answer()
        receipt = (await posting).json()
        assert (receipt["priority"], receipt["warnings"]) == (had, warnings)
        assert (await job(capped, delivery.job_id, ALICE))["priority"] == had


async def test_a_stored_keys_own_highest_priority_goes_before_the_settings(
    redis_server: RedisServer,
    keys: RedisKeys,
    tmp_path: Path,
    worker: ScriptedWorker,
    add_key: AddKey,
) -> None:
    bob = add_key("bob", "--max-priority", "high")
    eve = add_key("eve", "--max-priority", "low")
    async with running_api(redis_server.url, keys, tmp_path, key_max_priority="normal") as api:
        for key, had in ((bob, "high"), (eve, "low")):
            posting = asyncio.create_task(api.post(headers=key, stream=False, priority="high"))
            assert (await worker.answer()).request.priority == had
            assert (await posting).status_code == 200


def test_the_previous_release_reads_a_file_of_keys_without_a_highest_priority(
    tmp_path: Path, add_key: AddKey
) -> None:
    """It refuses fields that it does not know."""
    add_key("bob")
    (key,) = json.loads((tmp_path / "keys.json").read_text())["keys"]
    assert "max_priority" not in key and "max_priority" not in key["limits"]
    key["max_priority"] = 3  # as that release writes it
    (tmp_path / "keys.json").write_text(json.dumps({"version": 1, "keys": [key]}))
    assert main(["keys", "list"]) == 0
