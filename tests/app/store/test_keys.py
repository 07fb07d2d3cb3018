"""The names of keys are written down twice, in Python and in Lua."""

import re
from importlib.resources import files

from redis.asyncio import Redis

from app.store.keys import GROUP, RedisKeys


async def test_lua_and_python_name_the_same_keys(redis: Redis, keys: RedisKeys) -> None:
    prelude = (files("app.store") / "lua" / "prelude.lua").read_text()
    in_lua = {}
    functions = re.findall(r"local function ((\w+)_(?:key|channel))\((\w*)\)", prelude)
    for function, name, argument in functions:
        call = f"return {function}('x')" if argument else f"return {function}()"
        in_lua[name] = (await redis.eval(prelude + call, 0, keys.prefix)).decode()
    in_python = {}
    for name in in_lua:
        member = getattr(keys, name)
        in_python[name] = member if isinstance(member, str) else member("x")
    assert in_lua == in_python
    assert len(in_lua) >= 15
    assert await redis.eval(prelude + "return GROUP", 0, keys.prefix) == GROUP.encode()
