"""Lists of videos are made one at a time, and keys take turns."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from app.store.keys import RedisKeys
from tests.integration.api import running_api, until
from tests.integration.api_keys import KEYS, A, B
from tests.integration.conftest import RedisServer


async def test_a_key_waits_for_one_list_of_anothers_and_not_for_all_of_them(
    redis_server: RedisServer, keys: RedisKeys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_api(redis_server.url, keys, tmp_path, api_keys=KEYS) as api:
        begun, num_ended, may_end = list[str](), 0, threading.Semaphore(0)

        def page(owner: str, *_: Any) -> tuple[list[Any], bool]:
            nonlocal num_ended
            begun.append(owner)
            assert may_end.acquire(timeout=20)
            num_ended += 1
            return [], False

        monkeypatch.setattr(api.api.videos, "_page", page)
        asked = [asyncio.create_task(api.client.get("/v1/files", headers=A)) for _ in range(8)]
        await until(lambda: len(begun) == 1)
        asked.append(asyncio.create_task(api.client.get("/v1/files", headers=B)))
        # An answer that was asked for later, on a connection of its own: the list is in line.
        assert (await api.client.get("/v1/models", headers=B)).status_code == 200
        for number in range(1, len(asked)):
            assert num_ended == len(begun) - 1 == number - 1, "one at a time"
            may_end.release()
            await until(lambda done=number: len(begun) == done + 1)
        may_end.release()
        assert {(await task).status_code for task in asked} == {200}
        (place,) = (at for at, owner in enumerate(begun) if begun.count(owner) == 1)
        assert place < len(asked) // 2
