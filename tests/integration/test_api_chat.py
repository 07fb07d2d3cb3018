"""Asking a video: streams, whole answers, fields, refusals; real uvicorn, real Redis."""

import asyncio
import json
from typing import Any

import pytest

from app.store.keys import RedisKeys
from dycoke_core.auto import AUTO, AUTO_PARAMETERS
from dycoke_core.config import POLICY_PARAMETERS, CompressionConfig
from dycoke_core.errors import (
    InvalidRequestError,
    ReadersUnavailableError,
    UnreadableVideoError,
    UnsupportedCodecError,
)
from tests.integration.api import (
    CLIP,
    EventReader,
    RunningApi,
    ScriptedWorker,
    parse_events,
    scripted_worker,
)
from tests.integration.conftest import RedisServer


async def test_answer_streams_token_by_token(api: RunningApi, worker: ScriptedWorker) -> None:
    async with api.posting() as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["cache-control"] == "no-store"
        reader = EventReader(response)
        job = await reader.next()
        assert job is not None and job.name == "job" and job.id is not None
        assert job.data["job_id"] == response.headers["x-job-id"]
        assert job.data["model"] == "tiny"
        assert job.data["compression"]["policy"] == "dycoke"
        reading = await reader.until("status", stage="reading_frames")
        assert reading.id is None
        delivery = await worker.take()
        await worker.status(delivery, "prefilling", 0.5)
        await reader.until("status", stage="prefilling", progress=0.5)
        for index in range(3):
            await worker.say(delivery, index)
            token = await reader.until("token", index=index)
            assert token.data["text"] == f"t{index} "
            assert token.data["token_ids"] == [100 + index]
            assert token.id is not None
        await worker.finish(delivery, 3)
        rest = await reader.rest()
    assert [event.name for event in rest] == ["done"]
    done = rest[0].data
    assert rest[0].id is not None
    assert done["text"] == "t0 t1 t2 "
    assert done["video_id"] == job.data["video_id"]
    assert done["frames"]["indices"] == list(range(32))
    assert done["cache"]["frames"] == "miss"
    assert done["timings_s"]["read_frames"] > 0


async def test_whole_answer_is_one_json_body(api: RunningApi, worker: ScriptedWorker) -> None:
    post = asyncio.create_task(api.post(stream=False))
    await worker.answer(3)
    response = await post
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json()["text"] == "t0 t1 t2 "
    assert response.headers["x-job-id"] == response.json()["job_id"]


async def test_fields_reach_the_worker_as_resolved(api: RunningApi, worker: ScriptedWorker) -> None:
    post = asyncio.create_task(
        api.post(
            question=None,
            messages=[
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": "Who?"},
                {"role": "assistant", "content": "A dog."},
                {"role": "user", "content": "Where?"},
            ],
            num_frames=4,
            start_s=1.5,
            end_s=3,
            max_tokens=7,
            temperature=0.5,
            top_p=0.9,
            seed=5,
            stop=["\n", "END"],
            compression={"policy": "dycoke", "k": 0.5, "l": 2, "p": 0.1},
            model="tiny",
        )
    )
    request = (await worker.answer()).request
    assert (await post).status_code == 200
    assert [turn.content for turn in request.messages] == ["Be short.", "Who?", "A dog.", "Where?"]
    assert request.frames is not None and request.frames.num_frames == 4
    assert (request.max_tokens, request.temperature, request.top_p) == (7, 0.5, 0.9)
    assert (request.seed, request.stop) == (5, ["\n", "END"])
    assert (request.compression["k"], request.compression["l"]) == (0.5, 2)
    assert (request.weights_digest, request.sampler_version) == ("w", 3)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("END", ["END"]), (["a", "b"], ["a", "b"]), ('["a", "b"]', ["a", "b"]), ("[x", ["[x"])],
)
async def test_stop_may_repeat_or_be_a_list(
    api: RunningApi, worker: ScriptedWorker, stop: Any, expected: list[str]
) -> None:
    post = asyncio.create_task(api.post(stop=stop))
    assert (await worker.answer()).request.stop == expected
    await post


async def test_stored_video_is_asked_by_json_and_its_frames_are_not_read_again(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    first = asyncio.create_task(api.post())
    await worker.answer()
    video_id = parse_events((await first).text)[0].data["video_id"]
    second = asyncio.create_task(
        api.post(clip=None, video_id=video_id, question="And then?", stream=False)
    )
    await worker.answer()
    receipt = (await second).json()
    assert receipt["cache"]["frames"] == "hit"
    assert receipt["frames"]["indices"] == list(range(32))
    assert receipt["video_id"] == video_id
    assert (api.readers.num_probes, api.readers.num_reads) == (1, 1)


async def test_jobs_about_one_new_video_read_it_once(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    api.readers.may_read.clear()
    posts = [asyncio.create_task(api.post(question=f"{n}?", stream=False)) for n in range(3)]
    async with asyncio.timeout(20):
        while api.readers.num_reads == 0 or (await api.api.jobs.queue.depth("tiny")).waiting < 3:
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.2)
    api.readers.may_read.set()
    for _ in posts:
        await worker.answer()
    assert {post.status_code for post in await asyncio.gather(*posts)} == {200}
    assert api.readers.num_reads == 1


async def test_sharing_jobs_outlive_the_cancel_of_the_one_that_read(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    api.readers.may_read.clear()
    async with api.posting(question="first?") as first:
        reader = EventReader(first)
        await reader.until("status", stage="reading_frames", progress=0.5)
        second = asyncio.create_task(api.post(question="second?", stream=False))
        async with asyncio.timeout(20):
            while (await api.api.jobs.queue.depth("tiny")).waiting < 2:
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)
        await api.client.delete(f"/v1/jobs/{first.headers['x-job-id']}")
    api.readers.may_read.set()
    await worker.answer()
    assert (await second).status_code == 200
    assert (api.readers.num_reads, api.readers.num_cancelled) == (1, 0)


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"question": None}, "body"),
    ({"question": ""}, "question"),
    ({"question": "x" * 40_000}, "question"),
    ({"messages": [{"role": "user", "content": "x"}]}, "body"),
    ({"question": None, "messages": []}, "messages"),
    ({"question": None, "messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"question": None, "messages": [{"role": "assistant", "content": "x"}]}, "body"),
    ({"num_frames": 0}, "num_frames"),
    ({"num_frames": 129}, "num_frames"),
    ({"num_frames": 1.5}, "num_frames"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5000}, "max_tokens"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"start_s": -1}, "start_s"),
    ({"start_s": 3, "end_s": 2}, "body"),
    ({"start_s": 11}, "start_s"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["x" * 300]}, "stop.0"),
    ({"stream": "maybe"}, "stream"),
    ({"on_disconnect": "explode"}, "on_disconnect"),
    ({"priority": "urgent"}, "priority"),
    ({"deadline_s": 0}, "deadline_s"),
    ({"deadline_s": 601}, "deadline_s"),
    ({"deadline_s": "soon"}, "deadline_s"),
    ({"priority": 1}, "priority"),
    ({"frames": 3}, "frames"),
]


@pytest.mark.parametrize("clip", [CLIP, None], ids=["form", "json"])
async def test_bad_field_is_refused_by_name(
    api: RunningApi, worker: ScriptedWorker, clip: bytes | None
) -> None:
    upload = await api.client.post("/v1/videos", files={"video": CLIP})
    base = {"video_id": upload.json()["video_id"]} if clip is None else {}
    for fields, field in BAD_FIELDS:
        response = await api.post(clip=clip, **base, **fields)
        assert response.status_code == 400, fields
        assert response.headers["content-type"] == "application/problem+json"
        problem = response.json()
        assert (problem["code"], problem["retryable"]) == ("invalid_request", False)
        assert field in [error["field"] for error in problem["errors"]], fields
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0


@pytest.mark.parametrize(
    ("compression", "word"),
    [
        ("fancy", "compression.policy"),
        ({"policy": "dycoke", "k": 2}, "compression.k"),
        ({"policy": "full", "k": 0.5}, "takes no parameter"),
        ({"policy": "dycoke", "k": "much"}, "compression.k"),
        ("{broken", "compression"),
        ("fastv", "compression.policy"),
        ({"policy": "vidcom2", "retained_ratio": -0.5}, "compression.retained_ratio must be"),
        ({"policy": "vidcom2", "k": 0.5}, "takes no parameter 'k'"),
        ({"policy": "random_ttm", "seed": -1}, "compression.seed must be"),
        ({"policy": "random_kv", "seed": 1.5}, "compression.seed must be a whole number"),
        ({"policy": "dycoke_one_shot", "threshold": 0.9}, "takes no parameter 'threshold'"),
    ],
)
async def test_bad_compression_is_refused(
    api: RunningApi, worker: ScriptedWorker, compression: Any, word: str
) -> None:
    response = await api.post(compression=compression)
    assert response.status_code == 400
    assert response.json()["code"] == "invalid_request"
    assert word in response.json()["detail"]


@pytest.mark.parametrize("policy", POLICY_PARAMETERS)
async def test_every_policy_reaches_the_worker_with_its_parameters(
    api: RunningApi, worker: ScriptedWorker, policy: str
) -> None:
    settings = CompressionConfig.parse(policy).as_dict()
    if "seed" in settings:
        settings["seed"] = 2**63 - 1
    post = asyncio.create_task(api.post(compression=settings))
    assert (await worker.answer()).request.compression == settings
    assert (await post).status_code == 200


async def test_openapi_document_says_what_each_policy_takes(api: RunningApi) -> None:
    document = (await api.client.get("/openapi.json")).json()
    field = document["components"]["schemas"]["ChatFields"]["properties"]["compression"]
    kinds = {option.get("title", option["type"]): option for option in field["anyOf"]}
    assert set(kinds["Policy"]["enum"]) == {AUTO, *POLICY_PARAMETERS}
    assert set(kinds) == {"Policy", "null", AUTO, *POLICY_PARAMETERS}
    assert set(kinds[AUTO]["properties"]) == {"policy", *AUTO_PARAMETERS}
    for policy, taken in POLICY_PARAMETERS.items():
        assert set(kinds[policy]["properties"]) == {"policy", *taken}
        assert kinds[policy]["additionalProperties"] is False
        for name, bounds in kinds[policy]["properties"].items():
            for bound in {"minimum", "maximum", "default"} & set(bounds):
                CompressionConfig.parse({"policy": policy, name: bounds[bound]})
            if "maximum" in bounds:
                with pytest.raises(InvalidRequestError):
                    CompressionConfig.parse({"policy": policy, name: bounds["maximum"] + 1})


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"[" * 5000, b"\xff", b'{"a": NaN}'])
async def test_malformed_json_is_a_400(
    api: RunningApi, worker: ScriptedWorker, body: bytes
) -> None:
    response = await api.client.post(
        "/v1/video/chat", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("body", "place"),
    [(b"", "line 1, column 0"), (b'{"question": "x",\n "k": }', "line 2, column 7")],
)
async def test_malformed_json_is_refused_with_its_place(
    api: RunningApi, worker: ScriptedWorker, body: bytes, place: str
) -> None:
    headers = {"content-type": "application/json"}
    response = await api.client.post("/v1/video/chat", content=body, headers=headers)
    assert response.json()["detail"] == f"the body is not valid JSON: see {place}"


async def test_other_content_types_are_a_415(api: RunningApi, worker: ScriptedWorker) -> None:
    response = await api.client.post("/v1/video/chat", data={"question": "x"})
    assert response.status_code == 415
    assert response.json()["code"] == "unsupported_media_type"


async def test_form_takes_a_video_or_an_id_not_both(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    for files, fields in (({"video": CLIP}, {"video_id": "vid_x"}), ({"other": b"x"}, {})):
        response = await api.client.post(
            "/v1/video/chat", files=files, data={"question": "x", **fields}
        )
        assert response.status_code == 400


@pytest.mark.parametrize(
    "clip", [b"", b"\x00", b"hello", b"#EXTM3U\nhttp://example.com/x.ts\n", b"\x89PNG" * 999]
)
async def test_what_is_no_video_is_a_415(
    api: RunningApi, worker: ScriptedWorker, clip: bytes
) -> None:
    response = await api.post(clip=clip)
    assert response.status_code == 415
    assert response.json()["code"] == "unsupported_container"
    assert (api.readers.num_probes, _stored(api)) == (0, [])


async def test_frames_of_a_fallback_after_a_kill_are_not_kept(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    """Each of its readers was killed; the next question may fare better."""
    api.readers.fallback_cause = "killed"
    digests = []
    for _ in range(2):
        post = asyncio.create_task(api.post(stream=False))
        delivery = await worker.answer()
        assert delivery.request.frames is not None
        digests.append(delivery.request.frames.digest)
        assert (await post).json()["cache"]["frames"] == "miss"
        api.readers.fallback_cause = None
    assert len(set(digests)) == 2
    post = asyncio.create_task(api.post(stream=False))
    await worker.answer()
    assert (await post).json()["cache"]["frames"] == "hit"


async def test_no_process_to_read_with_is_a_503_that_may_be_retried(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    error = ReadersUnavailableError("no process can be started")
    api.readers.probe_error = error
    response = await api.post()
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    problem = response.json()
    assert (problem["code"], problem["retryable"]) == ("readers_unavailable", True)
    api.readers.probe_error, api.readers.read_error = None, error
    response = await api.post(stream=False)
    assert (response.status_code, response.json()["code"]) == (503, "readers_unavailable")
    api.readers.read_error = None
    post = asyncio.create_task(api.post(stream=False))
    await worker.answer()
    assert (await post).status_code == 200


async def test_what_the_probe_refuses_is_told_before_the_headers_and_not_stored(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    api.readers.probe_error = UnsupportedCodecError("the codec is not taken")
    response = await api.post()
    assert response.status_code == 415
    assert response.json()["code"] == "unsupported_codec"
    assert _stored(api) == []
    assert (await api.api.jobs.queue.depth("tiny")).waiting == 0


async def test_what_fails_in_reading_is_an_event_or_a_status(
    api: RunningApi, worker: ScriptedWorker
) -> None:
    api.readers.read_error = UnreadableVideoError("no frame could be decoded")
    events = parse_events((await api.post()).text)
    assert [event.name for event in events][-1] == "error"
    assert events[-1].data["code"] == "unreadable_video"
    assert events[-1].id is not None
    response = await api.post(stream=False)
    assert response.status_code == 422
    assert response.json()["code"] == "unreadable_video"
    assert response.json()["job_id"] == response.headers["x-job-id"]


async def test_unexpected_error_in_reading_shows_an_incident_and_no_text(
    api: RunningApi, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    api.readers.read_error = RuntimeError("secret /path")
    response = await api.post(stream=False)
    assert response.status_code == 500
    assert response.json()["code"] == "internal_error"
    assert "secret" not in response.text
    incident = response.json()["detail"].rsplit(" ", 1)[-1]
    assert incident in {getattr(record, "incident", None) for record in caplog.records}


async def test_unknown_model_is_a_404_and_two_models_want_a_name(
    api: RunningApi, worker: ScriptedWorker, redis_server: RedisServer, keys: RedisKeys
) -> None:
    assert (await api.post(model="other")).json()["code"] == "model_not_found"
    async with scripted_worker(redis_server.url, keys, "another") as another:
        response = await api.post()
        assert response.status_code == 400
        assert "model" in response.json()["detail"]
        post = asyncio.create_task(api.post(model="tiny", stream=False))
        assert (await worker.answer()).request.model == "tiny"
        assert (await post).status_code == 200
        assert (await api.api.jobs.queue.depth(another.model)).waiting == 0


async def test_openapi_document_has_both_content_types(api: RunningApi) -> None:
    document = (await api.client.get("/openapi.json")).json()
    operation = document["paths"]["/v1/video/chat"]["post"]
    content = operation["requestBody"]["content"]
    schemas = {}
    for kind in ("multipart/form-data", "application/json"):
        name = content[kind]["schema"]["$ref"].rsplit("/", 1)[-1]
        schemas[kind] = document["components"]["schemas"][name]["properties"]
    form, body = schemas["multipart/form-data"], schemas["application/json"]
    assert set(form) - set(body) == {"video"}
    assert form["video"]["format"] == "binary"
    assert body["num_frames"]["default"] == 32
    assert set(operation["responses"]["200"]["content"]) == {
        "text/event-stream",
        "application/json",
    }
    for reference in {word for word in json.dumps(document).split('"') if word.startswith("#/")}:
        found = document
        for name in reference.split("/")[1:]:
            assert name in found, reference
            found = found[name]


def _stored(api: RunningApi) -> list[str]:
    directory = api.settings.data_dir / "videos"
    return [path.name for path in directory.rglob("*") if path.is_file() and path.name != ".lock"]
