"""A `data:` upload above the cap: how much of it is read, and how much of that is decoded."""

import base64
import binascii
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.api.openai import intake
from app.api.openai.streamed_json import base64_size
from app.store.keys import RedisKeys
from tests.integration.api import CLIP, MODEL, ScriptedWorker, running_api
from tests.integration.conftest import RedisServer
from tests.integration.openai_client import PATH

CAP = 32 * 1024
CHUNK = 3 * 1024  # bytes of video at a time
MAX_READ = 2**16  # bytes at a time that the server takes from its socket, roughly


async def test_a_video_above_the_cap_is_refused_before_it_is_decoded(
    redis_server: RedisServer,
    keys: RedisKeys,
    tmp_path: Path,
    worker: ScriptedWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its length is not announced: what counts is what has come."""
    num_read = num_decoded = num_sent = 0
    read_body = intake.read_body

    async def read_counted(request: Any, *, max_bytes: int) -> AsyncGenerator[bytes, None]:
        nonlocal num_read
        async for chunk in read_body(request, max_bytes=max_bytes):
            num_read += len(chunk)
            yield chunk

    def decode_counted(text: bytes, *, strict_mode: bool) -> bytes:
        nonlocal num_decoded
        data = binascii.a2b_base64(text, strict_mode=strict_mode)
        num_decoded += len(data)
        return data

    async def body() -> AsyncIterator[bytes]:
        nonlocal num_sent
        yield b'{"messages": [{"role": "user", "content": [{"video_url": "data:video/mp4;base64,'
        clip = CLIP + bytes(CHUNK - len(CLIP))
        for _ in range(40 * CAP // CHUNK):
            data = base64.b64encode(clip)
            num_sent += len(data)
            yield data
            clip = bytes(CHUNK)
        yield b'"}, "What happens?"]}]}'

    monkeypatch.setattr(intake, "read_body", read_counted)
    monkeypatch.setattr(
        "app.api.openai.streamed_json.binascii",
        SimpleNamespace(a2b_base64=decode_counted, Error=binascii.Error),
    )
    async with running_api(redis_server.url, keys, tmp_path, max_upload_bytes=CAP) as api:
        headers = {"Content-Type": "application/json"}
        response = await api.client.post(PATH, content=body(), headers=headers)
        assert response.status_code == 413
        error = response.json()["error"]
        assert error["code"] == "upload_too_large" and str(CAP) in error["message"]
        assert (await api.api.jobs.queue.depth(MODEL)).waiting == 0
    assert num_decoded <= CAP  # nothing, if all of it came at once
    assert num_read <= base64_size(CAP) + MAX_READ < num_sent
    assert not [path for path in (tmp_path / "videos").rglob("*") if path.is_file()]
