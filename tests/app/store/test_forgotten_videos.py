"""News of deleted videos, which every worker reads. What happens to frames: `test_frame_store`."""

import asyncio

import pytest
from redis.asyncio import Redis

from app.store import forgotten_videos
from app.store.forgotten_videos import ForgottenVideos
from app.store.keys import RedisKeys


@pytest.fixture
def videos(redis: Redis, keys: RedisKeys) -> ForgottenVideos:
    return ForgottenVideos(redis, keys)


async def test_workers_read_once_which_videos_to_forget(redis: Redis, keys: RedisKeys) -> None:
    api, worker = ForgottenVideos(redis, keys), ForgottenVideos(redis, keys)
    await api.forget("before the worker was")
    await asyncio.sleep(0.005)
    assert await worker.news() == []
    for video in ("a", "b"):
        await api.forget(video)
    assert await worker.news() == ["a", "b"]
    assert await worker.news() == []
    assert await redis.pttl(keys.forgotten) > 0 and await redis.pttl(keys.forgettings) > 0


async def test_every_worker_has_its_own_place_in_the_news(
    redis: Redis, keys: RedisKeys, videos: ForgottenVideos
) -> None:
    first, second = ForgottenVideos(redis, keys), ForgottenVideos(redis, keys)
    assert await first.news() == await second.news() == []
    await videos.forget("a")
    assert await first.news() == ["a"]
    await videos.forget("b")
    assert await second.news() == ["a", "b"] and await first.news() == ["b"]


async def test_much_news_comes_in_parts(
    videos: ForgottenVideos, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgotten_videos, "MAX_NEWS", 2)
    await videos.news()
    for number in range(5):
        await videos.forget(f"v{number}")
    assert [await videos.news() for _ in range(4)] == [["v0", "v1"], ["v2", "v3"], ["v4"], []]
