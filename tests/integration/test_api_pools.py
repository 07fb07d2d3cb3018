"""Several models behind one API, each with its own pool of workers.

The engines are real ones over small random checkpoints of every family but the bundled one's: two
of frames of any size, and one whose frames are all square.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from app.metrics import WorkerMetrics
from app.settings import Settings
from app.store.client import connect
from app.store.frame_store import decode_frames
from app.store.keys import RedisKeys
from app.worker.worker import Worker
from dycoke_core.config import CompressionConfig, EngineConfig
from dycoke_core.engine.engine import Engine
from dycoke_core.sequence import ChatMessage, FrameTiming, SamplingParams, Sequence
from tests.integration.api import RunningApi, running_api
from tests.integration.conftest import RedisServer
from tests.random_gemma import build_random_gemma3
from tests.random_qwen import build_random_qwen2_5_vl, build_random_qwen3_vl
from tests.video_clips import make_clip

QUESTION = "Describe the video."
BUILDERS = {
    "gemma3": build_random_gemma3,
    "qwen2.5-vl": build_random_qwen2_5_vl,
    "qwen3-vl": build_random_qwen3_vl,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    for name, build in BUILDERS.items():
        build(folder / name)
    return {name: folder / name for name in BUILDERS}


def engine_of(checkpoint: Path) -> Engine:
    config = EngineConfig(device="cpu", dtype="float32", kv_cache_bytes=2**25)
    return Engine.from_pretrained(checkpoint, config)


@asynccontextmanager
async def worker_of(redis_url: str, keys: RedisKeys, checkpoint: Path) -> AsyncIterator[None]:
    settings = Settings(redis_url=redis_url, redis_prefix=keys.prefix, model=str(checkpoint))
    redis = connect(redis_url)
    worker = Worker(
        settings,
        redis,
        lambda: engine_of(checkpoint),
        WorkerMetrics(CollectorRegistry(), model=settings.model_name),
        worker_id=f"worker-{checkpoint.name}",
    )
    running = asyncio.create_task(worker.run())
    try:
        yield
    finally:
        worker.stop()
        async with asyncio.timeout(60):
            await asyncio.gather(running, return_exceptions=True)
        assert await asyncio.to_thread(worker.close)
        await redis.aclose()


@pytest.fixture
async def api(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, checkpoints: dict[str, Path]
) -> AsyncIterator[RunningApi]:
    """With a worker for each model."""
    async with AsyncExitStack() as stack:
        for checkpoint in checkpoints.values():
            await stack.enter_async_context(worker_of(redis_server.url, keys, checkpoint))
        api = await stack.enter_async_context(
            running_api(redis_server.url, keys, tmp_path / "data", has_real_readers=True)
        )
        async with asyncio.timeout(60):
            while len((await api.client.get("/v1/models")).json()["data"]) < len(checkpoints):
                await asyncio.sleep(0.05)
        yield api


async def ask(api: RunningApi, clip: bytes, **fields: Any) -> dict[str, Any]:
    response = await api.post(clip=clip, question=QUESTION, stream=False, max_tokens=6, **fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def clip_of(folder: Path) -> bytes:
    return make_clip(folder / "clip.mp4", num_frames=20, width=320, height=180).read_bytes()


async def test_the_field_chooses_the_pool_and_each_model_sees_its_frames(
    api: RunningApi, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Through the whole service as by the engine alone: bytes, sizes and times arrive."""
    clip = clip_of(tmp_path)
    pixels: dict[str, dict[str, Any]] = {
        "gemma3": {},
        "qwen2.5-vl": {"max_pixels": 128 * 128},
        "qwen3-vl": {"max_pixels": 128 * 128},
    }
    asked = [ask(api, clip, model=name, num_frames=5, **own) for name, own in pixels.items()]
    receipts = dict(zip(pixels, await asyncio.gather(*asked), strict=True))
    sizes = {"gemma3": (56, 56), "qwen2.5-vl": (84, 168), "qwen3-vl": (96, 160)}
    grids = {"gemma3": (5, 4, 2, 2), "qwen2.5-vl": (3, 18, 3, 6), "qwen3-vl": (3, 15, 3, 5)}
    for name, receipt in receipts.items():
        frames, kept = receipt["frames"], receipt["compression"]
        assert receipt["model"] == name
        assert (frames["height"], frames["width"]) == sizes[name]
        grid = (kept["units"], kept["tokens_per_unit"], kept["rows"], kept["columns"])
        assert grid == grids[name]
        assert kept["visual_tokens_in"] == kept["units"] * kept["tokens_per_unit"]
        record = await api.api.jobs.find(receipt["job_id"], "anonymous")
        assert record.request.frames is not None
        blob = await api.api.frame_images.frames.get(record.request.frames.digest)
        assert blob is not None
        expected = await asyncio.to_thread(answer_alone, checkpoints[name], blob)
        assert receipt["text"] == expected
    assert receipts["gemma3"]["compression"]["pruned_layers"] == [5]
    for name in ("qwen2.5-vl", "qwen3-vl"):
        assert receipts[name]["compression"]["pruned_layers"] == [3]


def answer_alone(checkpoint: Path, blob: bytes) -> str:
    video = decode_frames(blob)
    engine = engine_of(checkpoint)
    engine.add(
        Sequence(
            "alone",
            (ChatMessage("user", QUESTION),),
            video.pixels,
            SamplingParams(max_tokens=6),
            CompressionConfig(),
            timing=FrameTiming.shown_at(video.timestamps_s, video.shown_s),
        )
    )
    text = ""
    while engine.has_work:
        text += "".join(event.text for event in engine.step())
    return text


async def test_models_are_listed_with_their_limits(api: RunningApi) -> None:
    listed = {model["id"]: model for model in (await api.client.get("/v1/models")).json()["data"]}
    assert set(listed) == set(BUILDERS)
    gemma, qwen = listed["gemma3"], listed["qwen3-vl"]
    assert (gemma["frame_limits"], gemma["image_size"], gemma["frames_per_unit"]) == (None, 56, 1)
    assert (gemma["tokens_per_frame"], gemma["num_layers"]) == (4, 6)
    assert qwen["frame_limits"] == {
        "multiple": 32,
        "min_pixels": 4096,
        "max_pixels": 25165824,
        "frames_per_unit": 2,
    }
    assert (qwen["image_size"], qwen["frames_per_unit"]) == (448, 2)
    assert all(model["num_workers"] == 1 for model in listed.values())
    one = (await api.client.get("/v1/models/qwen3-vl")).json()
    assert one == qwen


async def test_a_model_must_be_named_and_served(api: RunningApi, tmp_path: Path) -> None:
    clip = clip_of(tmp_path)
    unnamed = await api.post(clip=clip)
    assert (unnamed.status_code, unnamed.json()["code"]) == (400, "invalid_request")
    detail = unnamed.json()["detail"]
    assert detail.startswith("name one of the models in 'model': ") and "gemma3" in detail
    unknown = await api.post(clip=clip, model="llama")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "model_not_found")
    assert "gemma3" in unknown.json()["detail"], "what would be right"
    body = {"model": "llama", "messages": [{"role": "user", "content": QUESTION}]}
    completion = await api.client.post("/v1/chat/completions", json=body)
    assert (completion.status_code, completion.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_model_whose_last_worker_left_is_no_longer_served_and_the_other_is(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    async with AsyncExitStack() as stack:
        for checkpoint in checkpoints.values():
            entered = worker_of(redis_server.url, keys, checkpoint)
            if checkpoint.name == "gemma3":
                leaving = entered
                await leaving.__aenter__()
            elif checkpoint.name == "qwen3-vl":
                await stack.enter_async_context(entered)
        api = await stack.enter_async_context(
            running_api(redis_server.url, keys, tmp_path / "data", has_real_readers=True)
        )
        async with asyncio.timeout(60):
            while len((await api.client.get("/v1/models")).json()["data"]) < 2:
                await asyncio.sleep(0.05)
        await leaving.__aexit__(None, None, None)
        clip = clip_of(tmp_path)
        refused = await api.post(clip=clip, model="gemma3")
        assert (refused.status_code, refused.json()["code"]) == (404, "model_not_found")
        assert (await ask(api, clip, num_frames=2))["model"] == "qwen3-vl"  # the only one now
