"""What uploads may evict: nothing while they come in, their own key's videos where it has a quota,
and others' where the store is full.
"""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.keys.entries import EVERYBODY
from app.store.keys import RedisKeys
from dycoke_core.errors import UnreadableVideoError
from tests.integration.api import CLIP, RunningApi, running_api
from tests.integration.api_keys import KEYS, A, B
from tests.integration.conftest import AddKey, RedisServer

KIB = 1024


@pytest.fixture
async def api(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path
) -> AsyncIterator[RunningApi]:
    settings: dict[str, Any] = {
        "api_keys": KEYS,
        "max_upload_bytes": 16 * KIB,
        "max_incoming_bytes": 24 * KIB,
        "max_video_store_bytes": 24 * KIB,
        "max_stored_videos": 8,
        "key_max_stored_videos": 3,
    }
    async with running_api(redis_server.url, keys, tmp_path, **settings) as api:
        yield api


def clip(number: int, num_bytes: int = 4 * KIB) -> bytes:
    return (CLIP + bytes([number])).ljust(num_bytes, b"x")


async def upload(api: RunningApi, content: bytes, who: dict[str, str] = A) -> httpx.Response:
    return await api.client.post("/v1/videos", files={"video": content}, headers=who)


async def upload_all(api: RunningApi, numbers: range, who: dict[str, str]) -> list[str]:
    replies = [await upload(api, clip(number), who) for number in numbers]
    return [str(reply.json()["video_id"]) for reply in replies]


async def found(api: RunningApi, ids: list[str], who: dict[str, str]) -> list[bool]:
    replies = [await api.client.get(f"/v1/videos/{each}", headers=who) for each in ids]
    return [reply.status_code == 200 for reply in replies]


async def test_junk_that_is_no_video_displaces_nobodys(api: RunningApi) -> None:
    mine, others = [await upload_all(api, range(3), who) for who in (A, B)]
    api.readers.probe_error = UnreadableVideoError("no frames in it")
    for number in range(4):
        junk = await upload(api, clip(100 + number, 16 * KIB))
        assert (junk.status_code, junk.json()["code"]) == (422, "unreadable_video")
    assert await found(api, mine, A) == await found(api, others, B) == [True] * 3


async def test_key_over_its_quota_displaces_its_own_videos(api: RunningApi) -> None:
    others = await upload_all(api, range(1), B)
    mine = await upload_all(api, range(5), A)
    assert await found(api, mine, A) == [False, False, True, True, True]
    assert await found(api, others, B) == [True]


async def test_uploads_under_way_have_a_budget(api: RunningApi) -> None:
    async with api.api.uploads.receive(EVERYBODY) as first:
        await first.write(bytes(16 * KIB))
        await first.finish()
        refused = await upload(api, clip(0, 12 * KIB))
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_uploads")
        assert refused.json()["retryable"] and int(refused.headers["Retry-After"]) > 0
    assert (await upload(api, clip(0, 12 * KIB))).status_code == 201


async def test_keys_own_limits_go_before_the_settings(api: RunningApi, add_key: AddKey) -> None:
    limits = ["--max-stored-videos", "1", "--max-stored-bytes", str(5 * KIB)]
    small = add_key("small", *limits)
    api.api.keys.refresh()
    ids = await upload_all(api, range(2), small)
    assert await found(api, ids, small) == [False, True]
    large = await upload(api, clip(7, 6 * KIB), small)
    assert (large.status_code, large.json()["code"]) == (413, "upload_too_large")
