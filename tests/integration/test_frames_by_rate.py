"""`fps` of `/v1/video/chat`: how many frames it takes of a video of 10 s at 25 frames a second, and
how the job and its receipt report it."""

import asyncio
from typing import Any

import pytest

from app.api.post import chat_intake
from app.video_store.types import VideoLease
from tests.integration.api import CLIP, RunningApi, ScriptedWorker


@pytest.mark.parametrize(
    ("fields", "num_frames", "warnings"),
    [
        ({"fps": 2}, 20, []),
        ({"fps": 2, "num_frames": 7}, 7, ["fps 2: 20 frames wanted, 7 are the most"]),
        ({"fps": 1, "start_s": 1, "end_s": 5.5}, 4, []),
        ({"fps": 60}, 128, ["fps 60: the video has 25", "fps 60: 250 frames wanted, 128 are"]),
        ({"num_frames": 7}, 7, []),
        ({}, 32, []),
    ],
    ids=str,
)
async def test_a_rate_is_counted_and_told(
    fields: dict[str, Any],
    num_frames: int,
    warnings: list[str],
    api: RunningApi,
    worker: ScriptedWorker,
) -> None:
    stored = (await api.client.post("/v1/videos", files={"video": CLIP})).json()["video_id"]
    answering = asyncio.create_task(worker.answer(1))
    body = {"video_id": stored, "question": "What?", "stream": False, **fields}
    response = await api.client.post("/v1/video/chat", json=body)
    assert response.status_code == 200, response.text
    request = (await answering).request
    wanted, frames, asked = request.frames_wanted, request.frames, fields.get("fps")
    assert wanted is not None and frames is not None
    assert (wanted.num_frames, wanted.fps, frames.fps) == (num_frames, asked, asked)
    receipt = response.json()
    assert len(receipt["frames"]["indices"]) == num_frames
    said = receipt["warnings"]
    assert len(said) == len(warnings)
    assert all(expected in actual for expected, actual in zip(warnings, said, strict=True))


@pytest.mark.parametrize("fps", [1e308, 1.1e9, 0, -1])
async def test_a_rate_out_of_range_is_refused(
    fps: float, api: RunningApi, worker: ScriptedWorker
) -> None:
    stored = (await api.client.post("/v1/videos", files={"video": CLIP})).json()["video_id"]
    body = {"video_id": stored, "question": "What?", "fps": fps}
    response = await api.client.post("/v1/video/chat", json=body)
    assert (response.status_code, response.json()["code"]) == (400, "invalid_request")
    assert [problem["field"] for problem in response.json()["errors"]] == ["fps"]


@pytest.mark.parametrize("is_upload", [False, True])
async def test_a_count_that_fails_gives_the_video_back(
    is_upload: bool, api: RunningApi, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[str] = []
    release = VideoLease.release

    def note(lease: VideoLease) -> None:
        if failing:
            released.append(lease.video.video_id)
        release(lease)

    def fail(*_: Any, **__: Any) -> tuple[int, list[str]]:
        failing.append(True)
        raise OverflowError("cannot count")

    failing: list[bool] = []
    stored = (await api.client.post("/v1/videos", files={"video": CLIP})).json()["video_id"]
    monkeypatch.setattr(VideoLease, "release", note)
    monkeypatch.setattr(VideoLease, "__del__", lambda _: None)  # the net below
    monkeypatch.setattr(chat_intake, "count_by_rate", fail)
    if is_upload:
        response = await api.post(fps=2)
    else:
        response = await api.post(clip=None, video_id=stored, fps=2)
    assert response.status_code == 500 and failing
    assert released == [stored]
