"""`kept_mask` over HTTP, and `/v1/jobs/{id}/kept`."""

import asyncio
import base64
from typing import Any

from app.store.kept_sets import KeptSets
from dycoke_core.kept_sets import KeptHistory
from tests.integration.api import (
    CLIP,
    MODEL,
    RunningApi,
    ScriptedWorker,
    receipt,
    until_state,
)
from tests.integration.kept import HISTORY_OF_TOKENS, history


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
        assert await KeptSets(worker.redis, worker.keys).put(delivery, made.encode())
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
