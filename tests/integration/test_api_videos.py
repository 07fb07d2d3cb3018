"""Real files through the real, sandboxed readers: each upload gets an answer or its own 4xx."""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis

from app.store.frame_store import decode_frames
from app.store.keys import RedisKeys
from tests.integration.api import (
    RunningApi,
    ScriptedWorker,
    parse_events,
    running_api,
    scripted_worker,
)
from tests.integration.conftest import RedisServer
from tests.video_clips import frame_numbers, make_audio, make_clip, make_flat_clip


@pytest.fixture
async def worker(redis_server: RedisServer, keys: RedisKeys) -> AsyncIterator[ScriptedWorker]:
    async with scripted_worker(redis_server.url, keys, image_size=112) as worker:
        yield worker


@pytest.fixture
async def api(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> AsyncIterator[RunningApi]:
    async with running_api(redis_server.url, keys, tmp_path / "data", has_real_readers=True) as api:
        yield api


@pytest.mark.parametrize(
    ("name", "codec"),
    [("x.mp4", "libx264"), ("x.webm", "libvpx-vp9"), ("x.avi", "mpeg4"), ("x.mkv", "libx265")],
)
async def test_frames_of_a_video_reach_the_worker(
    api: RunningApi,
    worker: ScriptedWorker,
    redis: Redis,
    keys: RedisKeys,
    tmp_path: Path,
    name: str,
    codec: str,
) -> None:
    content = make_clip(tmp_path / name, codec=codec, num_frames=40).read_bytes()
    post = asyncio.create_task(api.post(clip=content, num_frames=5))
    delivery = await worker.take()
    assert delivery.request.frames is not None
    blob = await redis.get(keys.frames(delivery.request.frames.digest))
    assert blob is not None
    assert frame_numbers(decode_frames(blob).pixels) == [0, 9, 19, 29, 39]
    await worker.finish(delivery, 0)
    done = parse_events((await post).text)[-1].data
    assert done["frames"]["indices"] == [0, 9, 19, 29, 39]


def reader_servers() -> list[int]:
    children = psutil.Process().children()
    return [p.pid for p in children if "dycoke_core.video.fork_server" in p.cmdline()]


@contextmanager
def killing_the_reader(number: int) -> Iterator[None]:
    """Kills, once, the n-th child that a server of frame readers forks."""
    seen: set[int] = set()
    is_over = threading.Event()

    def watch() -> None:
        lists = [Path(f"/proc/{pid}/task/{pid}/children") for pid in reader_servers()]
        while not is_over.wait(0.0005):
            for pid in " ".join(path.read_text() for path in lists).split():
                seen.add(int(pid))
                if len(seen) == number:
                    os.kill(int(pid), signal.SIGKILL)
                    return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    assert len(seen) == number


@pytest.mark.parametrize(("number", "task"), [(1, "probe"), (2, "plan"), (3, "read")])
async def test_reader_killed_from_outside_is_not_the_videos_fault(
    api: RunningApi, worker: ScriptedWorker, tmp_path: Path, number: int, task: str
) -> None:
    content = make_clip(tmp_path / "x.mp4", num_frames=40, width=640, height=480).read_bytes()
    with killing_the_reader(number):
        post = asyncio.create_task(api.post(clip=content, num_frames=5, stream=False))
        delivery = await worker.take()
        assert delivery.request.frames is not None
        assert (delivery.request.frames.reader, delivery.request.frames.warnings) == ("decord", [])
        await worker.finish(delivery, 0)
    assert (await post).status_code == 200, task


async def test_uploads_survive_the_death_of_all_readers(
    api: RunningApi, worker: ScriptedWorker, tmp_path: Path
) -> None:
    clips = [
        make_clip(tmp_path / f"{i}.mp4", num_frames=30 + i, width=640, height=480).read_bytes()
        for i in range(6)
    ]
    posts = [asyncio.create_task(api.post(clip=clip, num_frames=4)) for clip in clips]
    await asyncio.sleep(0.2)
    for pid in reader_servers():
        os.kill(pid, signal.SIGKILL)
    for _ in clips:
        await worker.answer()
    for post in posts:
        assert parse_events((await post).text)[-1].name == "done"


async def test_clip_of_a_video_is_what_is_read(
    api: RunningApi, worker: ScriptedWorker, tmp_path: Path
) -> None:
    content = make_clip(tmp_path / "x.mp4", num_frames=50).read_bytes()
    post = asyncio.create_task(
        api.post(clip=content, num_frames=2, start_s=0.4, end_s=1.0, stream=False)
    )
    await worker.answer()
    assert (await post).json()["frames"]["indices"] == [10, 24]
    beyond = await api.post(clip=content, start_s=5)
    assert (beyond.status_code, beyond.json()["errors"][0]["field"]) == (400, "start_s")


async def test_keyframes_alone_are_read_on_request(
    api: RunningApi, worker: ScriptedWorker, tmp_path: Path
) -> None:
    content = make_clip(tmp_path / "x.mp4", num_frames=50, options={"g": "10"}).read_bytes()
    receipts = {}
    for sampling in ("keyframe", "uniform"):
        post = asyncio.create_task(
            api.post(clip=content, num_frames=3, sampling=sampling, stream=False)
        )
        await worker.answer()
        receipts[sampling] = (await post).json()
    keyframes = receipts["keyframe"]["frames"]
    assert (keyframes["sampling"], keyframes["indices"]) == ("keyframe", [0, 20, 40])
    assert keyframes["timestamps_s"] == pytest.approx([0.0, 0.8, 1.6])
    assert receipts["uniform"]["frames"]["indices"] == [0, 24, 49]
    assert receipts["uniform"]["cache"]["frames"] == "miss"
    refused = await api.post(clip=content, sampling="random")
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (400, "sampling")


async def test_what_cannot_be_read_gets_its_own_4xx(
    api: RunningApi, worker: ScriptedWorker, tmp_path: Path
) -> None:
    clip = make_clip(tmp_path / "x.mp4", num_frames=30).read_bytes()
    refused = {
        "nothing": (b"", 415),
        "random": (os.urandom(5000), 415),
        "playlist": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", 415),
        "sound": (make_audio(tmp_path / "sound.mp4").read_bytes(), 415),
        "huge": (make_flat_clip(tmp_path / "huge.mp4", width=8192, height=4320).read_bytes(), 413),
        "cut": (clip[:600], 422),
        "hollow": (clip[:40] + bytes(len(clip)), 422),
    }
    for name, (content, status) in refused.items():
        response = await api.post(clip=content)
        assert response.status_code == status, (name, response.text)
        assert response.headers["content-type"] == "application/problem+json"
    names = {p.name for p in (tmp_path / "data" / "videos").rglob("*")}
    assert names == {"incoming", "owners", ".lock"}
    post = asyncio.create_task(api.post(clip=clip, stream=False))
    await worker.answer()
    assert (await post).status_code == 200
