"""The connection: cancellation, outages, errors that clients may read, scripts."""

import asyncio
import re
from importlib.resources import files

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from app.errors import StoreUnavailableError
from app.store.client import PRELUDE, Scripts, connect, load_script, store_call
from app.store.keys import RedisKeys
from tests.integration.conftest import RedisServer

LUA = files("app.store") / "lua"
BUILT_IN = {
    *("and", "function", "if", "ipairs", "next", "not", "or", "pairs", "pcall", "return", "select"),
    *("tonumber", "tostring", "type", "unpack"),
}
SCRIPTS = sorted({f.name.removesuffix(".lua") for f in LUA.iterdir()} - set(PRELUDE))


async def test_cancelling_a_call_is_never_swallowed(redis: Redis, keys: RedisKeys) -> None:
    """At whichever turn of the event loop the cancellation comes."""
    scripts = Scripts(redis, keys.prefix)
    for turns in range(12):
        await scripts.run("depth", "m")
        call = asyncio.create_task(scripts.run("depth", "m"))
        for _ in range(turns):
            await asyncio.sleep(0)
        if call.done():
            break
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_client_outlives_a_restart_of_redis(own_redis_server: RedisServer) -> None:
    redis = connect(own_redis_server.url)
    scripts = Scripts(redis, "p")
    await scripts.run("depth", "m")
    own_redis_server.stop()
    with pytest.raises(StoreUnavailableError):
        await scripts.run("depth", "m")
    own_redis_server.start()
    assert await scripts.run("depth", "m") == [0, 0, 0, -1, 0]
    await redis.aclose()


async def test_scripts_that_redis_has_forgotten_are_loaded_again(
    redis: Redis, keys: RedisKeys
) -> None:
    scripts = Scripts(redis, keys.prefix)
    await redis.script_flush()
    assert await scripts.run("depth", "m") == [0, 0, 0, -1, 0]


async def test_full_or_read_only_redis_is_unavailable(own_redis_server: RedisServer) -> None:
    redis = connect(own_redis_server.url)
    scripts = Scripts(redis, "p")
    await redis.config_set("maxmemory", 1)
    with pytest.raises(StoreUnavailableError):
        await scripts.run("reserve", "m", "j", 1, 1000, "a", 1)
    with pytest.raises(StoreUnavailableError):
        async with store_call():
            await redis.set("a", "b")
    await redis.config_set("maxmemory", 0)
    await redis.replicaof("127.0.0.1", "1")
    with pytest.raises(StoreUnavailableError):
        await scripts.run("reserve", "m", "j", 1, 1000, "a", 1)
    await redis.aclose()


async def test_redis_that_does_not_answer_in_time_is_unavailable(
    own_redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = connect(own_redis_server.url)
    await redis.ping()
    monkeypatch.setattr("app.store.client.CALL_TIMEOUT_S", 0.1)
    await redis.client_pause(500)
    with pytest.raises(StoreUnavailableError):
        async with store_call():
            await redis.set("a", "b")
    await redis.aclose()


async def test_mistakes_of_ours_are_not_called_an_outage(redis: Redis) -> None:
    with pytest.raises(ResponseError):
        async with store_call():
            await redis.execute_command("NO SUCH COMMAND")


@pytest.mark.parametrize("url", ["", "localhost", "http://localhost", "redis://h:port"])
def test_what_is_no_redis_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        connect(url)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_sent_with_all_that_it_uses_of_what_is_shared(name: str) -> None:
    shared = {word for part in PRELUDE for word in _defined((LUA / f"{part}.lua").read_text())}
    text = load_script(name)[0]
    assert text.endswith((LUA / f"{name}.lua").read_text())
    code = re.sub(r"--.*|'[^'\n]*'", "", text)
    assert shared & set(re.findall(r"\w+", code)) <= _defined(text)
    assert _called(code) <= _defined(code, at_top=False) | BUILT_IN
    declared = re.search(r"^local (\w+(?:, \w+)*)$", code, re.MULTILINE)
    for name in declared[1].split(", ") if declared else ():
        assert f"\n{name} = function" in text or name not in code.replace(declared[0], "")


def test_script_is_sent_without_what_it_does_not_use() -> None:
    text = load_script("enter")[0]
    assert "local function job_key" in text and "local function finish" not in text


def _defined(text: str, *, at_top: bool = True) -> set[str]:
    """Names of what a script defines, at its top level or anywhere."""
    start = "^" if at_top else r"^\s*"
    found = re.findall(start + r"local (?:function )?(\w+(?:, \w+)*)", text, re.MULTILINE)
    return {name for names in found for name in names.split(", ")}


def _called(code: str) -> set[str]:
    """Names that are called, but not out of a table."""
    return set(re.findall(r"(?<![.:\w])(\w+)\(", code))
