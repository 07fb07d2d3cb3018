"""The connection to Redis, its errors in our words, and the Lua scripts that change job states.

Every wait ends: `store_call` limits each use of the client, a busy pool refuses sooner, and a
blocking read never blocks for longer than `MAX_BLOCK_S`. Nothing here knows jobs or keys.

Not covered: Redis Cluster.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from hashlib import sha1
from importlib.resources import files
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import (
    ConnectionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError

from app.errors import StoreUnavailableError

MAX_BLOCK_S = 5.0  # longest XREAD ... BLOCK; below CALL_TIMEOUT_S
CALL_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 3.0
# Conditions of the server, as opposed to mistakes of ours. Out of a script they come as an
# ordinary ResponseError with the word inside the text.
_SERVER_CONDITIONS = (
    "OOM ", "READONLY ", "MISCONF ", "LOADING ", "BUSY ", "MASTERDOWN ", "NOREPLICAS ",
)  # fmt: skip

PRELUDE = ("prelude", "limits", "order", "blame")  # what every script begins with
ScriptArg = str | bytes | int | float


def connect(url: str, *, max_connections: int = 64) -> Redis:
    """Makes a client; connects lazily, and reconnects after an outage.

    Args:
        url: redis://, rediss:// or unix:///path.
        max_connections: more commands at a time than this wait for one another, at most
            `CONNECT_TIMEOUT_S`. A blocking read holds a connection for as long as it blocks.

    Raises:
        ValueError: not a URL of a Redis.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=CONNECT_TIMEOUT_S,
        protocol=2,
        decode_responses=False,
        # `store_call` limits calls instead. With a limit of its own the client writes through
        # asyncio.wait_for, which before Python 3.12 swallows a cancellation that comes just then.
        socket_timeout=None,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        health_check_interval=15,
        # Every script may be sent twice. Longer outages are for the caller to handle.
        retry=Retry(ExponentialBackoff(cap=0.2, base=0.02), retries=2),
    )
    return Redis.from_pool(pool)


@asynccontextmanager
async def store_call() -> AsyncIterator[None]:
    """Encloses every use of the client: limits it to `CALL_TIMEOUT_S`, and turns what Redis'
    absence or overload raises into `StoreUnavailableError`."""
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            yield
    except (TimeoutError, RedisTimeoutError, ConnectionError) as error:
        raise StoreUnavailableError("the job store does not answer") from error
    except (ReadOnlyError, OutOfMemoryError) as error:
        raise StoreUnavailableError("the job store refuses to write") from error
    except ResponseError as error:
        if is_server_condition(str(error)):
            raise StoreUnavailableError("the job store refuses to write") from error
        raise


def is_server_condition(text: str) -> bool:
    """Whether an error that Redis replied with is about the server, and will pass."""
    return any(condition in f"{text} " for condition in _SERVER_CONDITIONS)


class Scripts:
    """Runs the scripts of `app/store/lua` by their digest, loading them where Redis lacks them."""

    def __init__(self, redis: Redis, prefix: str) -> None:
        self._redis = redis
        self._prefix = prefix

    async def run(self, name: str, *args: ScriptArg) -> Any:
        """Runs one script.

        Raises:
            StoreUnavailableError: Redis does not answer or does not take writes.
        """
        source, digest = load_script(name)
        async with store_call():
            try:
                return await self._call(digest, args)
            except NoScriptError:
                await self._redis.script_load(source)
                return await self._call(digest, args)

    async def _call(self, digest: str, args: Sequence[ScriptArg]) -> Any:
        reply: Any = self._redis.evalsha(digest, 0, self._prefix, *args)
        return await reply


@cache
def load_script(name: str) -> tuple[str, str]:
    """Returns `lua/{name}.lua` with the shared prelude in front, and the SHA-1 of both."""
    folder = files("app.store") / "lua"
    text = "\n".join((folder / f"{part}.lua").read_text("utf-8") for part in (*PRELUDE, name))
    return text, sha1(text.encode(), usedforsecurity=False).hexdigest()


def milliseconds(duration_s: float) -> int:
    return round(duration_s * 1000)


def seconds(time_ms: bytes | None) -> float | None:
    return None if time_ms is None else int(time_ms) / 1000
