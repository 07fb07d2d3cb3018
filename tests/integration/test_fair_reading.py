"""Keys take turns at the frame readers, before any of their jobs is in the queue."""

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from app.store.keys import RedisKeys
from dycoke_core.video import FrameSpec, VideoFrames
from tests.integration.api import (
    CLIP,
    EventReader,
    RunningApi,
    ScriptedWorker,
    running_api,
    until,
)
from tests.integration.api_keys import KEYS, A, B
from tests.integration.conftest import RedisServer


async def upload(api: RunningApi, who: dict[str, str]) -> str:
    reply = await api.client.post("/v1/videos", files={"video": CLIP}, headers=who)
    video_id: str = reply.json()["video_id"]
    return video_id


def note_starts(api: RunningApi, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clips' starts, in the order in which their reads begin from now on."""
    starts: list[float] = []
    read = api.readers.read

    async def noted_read(path: Path, spec: FrameSpec, **options: Any) -> VideoFrames:
        starts.append(spec.start_s)
        return await read(path, spec, **options)

    monkeypatch.setattr(api.readers, "read", noted_read)
    return starts


@pytest.mark.parametrize(
    "settings",
    [{"max_frame_readers": 1}, {"max_held_frame_bytes": 1}],
    ids=["readers", "frames in hand"],
)
async def test_a_key_waits_for_one_read_of_anothers_and_not_for_all_of_them(
    redis_server: RedisServer,
    keys: RedisKeys,
    tmp_path: Path,
    worker: ScriptedWorker,
    settings: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with (
        running_api(redis_server.url, keys, tmp_path, api_keys=KEYS, **settings) as api,
        AsyncExitStack() as stack,
    ):
        videos = [await upload(api, who) for who in (A, B)]
        starts = note_starts(api, monkeypatch)
        api.readers.may_read.clear()
        readers: list[EventReader] = []

        async def ask(video_id: str, who: dict[str, str], start_s: float) -> None:
            """Posts a job and waits until its frames are being read, or wait for that."""
            posting = api.posting(clip=None, headers=who, video_id=video_id, start_s=start_s)
            readers.append(EventReader(await stack.enter_async_context(posting)))
            await readers[-1].until("status", stage="reading_frames")

        for number in range(6):
            await ask(videos[0], A, number)
        await ask(videos[1], B, 9)
        await until(lambda: starts == [0])
        api.readers.may_read.set()
        await until(lambda: len(starts) == 7)
        assert starts.index(9) <= 2, "after the read under way, and at most one more"
        assert [start for start in starts if start != 9] == list(range(6))
