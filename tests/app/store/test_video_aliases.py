"""Clients' own names of videos."""

import pytest
from redis.asyncio import Redis

from app.store import video_aliases
from app.store.keys import RedisKeys
from app.store.video_aliases import ALIAS_TTL_S, VideoAliases


async def test_a_name_is_its_owners_and_finds_the_last_video(redis: Redis, keys: RedisKeys) -> None:
    aliases = VideoAliases(redis, keys)
    await aliases.note("a", "holiday", "vid_1")
    await aliases.note("b", "holiday", "vid_2")
    await aliases.note("a", "holiday", "vid_3")
    assert await aliases.find("a", "holiday") == "vid_3"
    assert await aliases.find("b", "holiday") == "vid_2"
    assert await aliases.find("b", "work") is None
    # An owner and a name stay apart wherever one ends and the other begins.
    assert await aliases.find("a\0holi", "day") is None


async def test_a_name_goes_after_its_last_use(redis: Redis, keys: RedisKeys) -> None:
    await VideoAliases(redis, keys).note("a", "holiday", "vid_1")
    (key,) = await redis.keys(f"{keys.prefix}:alias:*")
    assert b"holiday" not in key
    assert 0 < await redis.ttl(key) <= ALIAS_TTL_S


async def test_an_owner_has_a_bounded_number_of_names(
    redis: Redis, keys: RedisKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_aliases, "MAX_ALIASES", 2)
    aliases = VideoAliases(redis, keys)
    for owner, alias in (("b", "1"), ("a", "1"), ("a", "2"), ("a", "1"), ("a", "3")):
        await aliases.note(owner, alias, f"vid_{alias}")
    found = {alias: await aliases.find("a", alias) for alias in "123"}
    assert found == {"1": "vid_1", "2": None, "3": "vid_3"}, "the least recently used goes"
    assert await aliases.find("b", "1") == "vid_1", "no other owner's"
    assert len(await redis.keys(f"{keys.prefix}:alias:*")) == 3
    assert 0 < await redis.ttl(keys.aliases("a")) <= ALIAS_TTL_S
