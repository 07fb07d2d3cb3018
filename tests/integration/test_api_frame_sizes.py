"""Models that take frames of any size, from the request to the receipt."""

import asyncio
import io
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import av
import numpy as np
import pytest

from app.messages import FrameLimits
from app.store.frame_store import decode_frames
from app.store.keys import RedisKeys
from tests.integration.api import RunningApi, ScriptedWorker, running_api, scripted_worker
from tests.integration.conftest import RedisServer
from tests.video_clips import frame_numbers, make_clip

OF_FRAME = FrameLimits(multiple=28, min_pixels=28 * 28, max_pixels=448 * 448)
OF_VIDEO = FrameLimits(multiple=32, min_pixels=4096, max_pixels=8 * 256 * 256, frames_per_unit=2)


@pytest.fixture
async def api(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> AsyncIterator[RunningApi]:
    async with running_api(
        redis_server.url, keys, tmp_path / "data", has_real_readers=True, max_frame_pixels=300**2
    ) as api:
        yield api


@pytest.fixture(params=[OF_FRAME])
async def worker(
    redis_server: RedisServer, keys: RedisKeys, request: pytest.FixtureRequest
) -> AsyncIterator[ScriptedWorker]:
    async with scripted_worker(
        redis_server.url, keys, image_size=112, frame_limits=request.param
    ) as worker:
        yield worker


async def ask(
    api: RunningApi, worker: ScriptedWorker, clip: bytes, **fields: Any
) -> tuple[dict[str, Any], np.ndarray]:
    """The receipt, and the frames as the worker gets them."""
    post = asyncio.create_task(api.post(clip=clip, stream=False, **fields))
    delivery = await worker.take()
    assert delivery.request.frames is not None
    blob = await api.api.frame_images.frames.get(delivery.request.frames.digest)
    assert blob is not None
    await worker.finish(delivery, 1)
    response = await post
    assert response.status_code == 200, response.text
    return response.json(), decode_frames(blob).pixels


def clip_of(folder: Path, **made: Any) -> bytes:
    return make_clip(folder / "clip.mp4", num_frames=20, **made).read_bytes()


async def test_frames_keep_the_videos_shape_from_the_reader_to_the_receipt(
    api: RunningApi, worker: ScriptedWorker, tmp_path: Path
) -> None:
    clip = clip_of(tmp_path, width=640, height=360)
    receipt, frames = await ask(api, worker, clip, num_frames=4)
    assert frames.shape == (4, 84, 140, 3)  # 112 * 112 pixels, in multiples of 28
    assert frame_numbers(frames) == receipt["frames"]["indices"] == [0, 6, 12, 19]
    assert (receipt["frames"]["height"], receipt["frames"]["width"]) == (84, 140)

    path = f"/v1/videos/{receipt['video_id']}/frames/2"
    shown = await api.client.get(path, params={"job_id": receipt["job_id"]})
    assert shown.status_code == 200
    with av.open(io.BytesIO(shown.content)) as png:
        (frame,) = png.decode(video=0)
        assert np.array_equal(frame.to_ndarray(format="rgb24"), frames[2])


async def test_a_request_chooses_its_pixels_and_each_choice_is_kept_apart(
    api: RunningApi, worker: ScriptedWorker, tmp_path: Path
) -> None:
    clip = clip_of(tmp_path, width=640, height=360)
    sizes, hits = [], []
    for max_pixels in (None, 200 * 200, 200 * 200, 40 * 40):
        receipt, frames = await ask(api, worker, clip, num_frames=2, max_pixels=max_pixels)
        sizes.append(frames.shape[1:3])
        hits.append(receipt["cache"]["frames"])
    assert sizes == [(84, 140), (140, 252), (140, 252), (28, 28)]
    assert hits == ["miss", "miss", "hit", "miss"]


@pytest.mark.parametrize("worker", [OF_VIDEO], indirect=True)
async def test_many_frames_of_a_model_whose_limit_is_of_the_video_are_smaller(
    api: RunningApi, worker: ScriptedWorker, tmp_path: Path
) -> None:
    clip = clip_of(tmp_path, width=320, height=320)
    sizes = []
    for num_frames in (2, 8, 20):
        _, frames = await ask(api, worker, clip, num_frames=num_frames, max_pixels=290 * 290)
        sizes.append(frames.shape)
    assert sizes == [(2, 288, 288, 3), (8, 256, 256, 3), (20, 160, 160, 3)]


async def test_a_turned_video_keeps_the_shape_that_it_is_shown_in(
    api: RunningApi, worker: ScriptedWorker, tmp_path: Path
) -> None:
    clip = clip_of(tmp_path, width=640, height=360, rotation=90)
    _, frames = await ask(api, worker, clip, num_frames=2)
    assert frames.shape == (2, 140, 84, 3)


async def test_more_pixels_than_the_service_allows_are_refused(
    api: RunningApi, worker: ScriptedWorker, tmp_path: Path
) -> None:
    clip = clip_of(tmp_path)
    for wrong in (300**2 + 1, 0):
        refused = await api.post(clip=clip, max_pixels=wrong)
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid_request")
        assert refused.json()["errors"][0]["field"] == "max_pixels"


async def test_a_shape_that_no_model_takes_is_refused_at_the_post(
    api: RunningApi, worker: ScriptedWorker, tmp_path: Path
) -> None:
    clip = make_clip(tmp_path / "thin.mp4", width=4096, height=16, num_frames=2).read_bytes()
    refused = await api.post(clip=clip)
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid_request")
    assert "200 times" in refused.json()["detail"]


async def test_models_of_one_size_refuse_a_budget_and_other_surfaces_say_that_it_has_no_effect(
    api: RunningApi, redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> None:
    clip = clip_of(tmp_path)
    async with scripted_worker(redis_server.url, keys, image_size=112) as worker:
        refused = await api.post(clip=clip, max_pixels=10_000)
        assert (refused.status_code, refused.json()["errors"][0]["field"]) == (400, "max_pixels")
        upload = await api.client.post("/v1/videos", files={"video": clip})
        answering = asyncio.create_task(worker.answer(1))
        body = chat_about(upload.json()["video_id"], mm_processor_kwargs={"max_pixels": 10_000})
        response = await api.client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        request = (await answering).request
    assert (
        request.frames is not None and (request.frames.height, request.frames.width) == (112,) * 2
    )
    assert response.json()["dycoke"]["warnings"] == [
        "max_pixels 10000: all of the model's frames have one size"
    ]


@pytest.mark.parametrize(
    ("part", "body", "size", "warnings"),
    [
        ({}, {"mm_processor_kwargs": {"max_pixels": 200 * 200}}, (140, 252), []),
        (
            {"max_pixels": 40 * 40},
            {"mm_processor_kwargs": {"max_pixels": 9}},
            (28, 28),
            ["max_pixels 9: the video's part says how many"],
        ),
        ({"max_pixels": 10**9}, {}, (224, 392), ["max_pixels 1000000000: 90000 are the most"]),
        ({}, {"mm_processor_kwargs": {"max_pixels": "x"}}, (84, 140), ["max_pixels: not honoured"]),
    ],
)
async def test_chat_completions_take_a_budget_as_other_servers_clients_name_it(
    part: dict[str, Any],
    body: dict[str, Any],
    size: tuple[int, int],
    warnings: list[str],
    api: RunningApi,
    worker: ScriptedWorker,
    tmp_path: Path,
) -> None:
    clip = clip_of(tmp_path, width=640, height=360)
    upload = await api.client.post("/v1/videos", files={"video": clip})
    answering = asyncio.create_task(worker.answer(1))
    response = await api.client.post(
        "/v1/chat/completions", json=chat_about(upload.json()["video_id"], part, **body)
    )
    assert response.status_code == 200, response.text
    request = (await answering).request
    assert request.frames is not None
    assert (request.frames.height, request.frames.width) == size
    said = response.json()["dycoke"]["warnings"]
    assert len(said) == len(warnings)
    assert all(expected in actual for expected, actual in zip(warnings, said, strict=True))


def chat_about(
    video_id: str, part: Mapping[str, Any] = MappingProxyType({}), **body: Any
) -> dict[str, Any]:
    content = [
        {"type": "video", "video": video_id, "num_frames": 2, **part},
        {"type": "text", "text": "What happens?"},
    ]
    return {"messages": [{"role": "user", "content": content}], **body}
