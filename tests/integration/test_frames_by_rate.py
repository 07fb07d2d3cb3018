"""`fps` of `/v1/video/chat`: how many frames it makes of a video of 10 s at 25 frames a second, and
what the job and its receipt say of it."""

import asyncio
from typing import Any

import pytest

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
