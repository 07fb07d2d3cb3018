"""The connection to Redis, its errors as ours, and the Lua scripts that change job states.

Every wait ends: `store_call` limits each use of the client, `SharedConnection` limits each call,
and a busy pool refuses sooner. This module knows neither jobs nor keys.

Not covered: Redis Cluster.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from hashlib import sha1
from importlib.resources import files
from types import TracebackType
from typing import Any, Literal, NamedTuple

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
from app.store.shared_connection import SharedConnection

CALL_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 3.0
RETRY_AFTER_S = 0.2  # between a worker's tries when Redis does not answer
# Conditions of the server, as opposed to mistakes of ours. Out of a script they come as an
# ordinary ResponseError with the word inside the text.
_SERVER_CONDITIONS = (
    "OOM ", "READONLY ", "MISCONF ", "LOADING ", "BUSY ", "MASTERDOWN ", "NOREPLICAS ",
)  # fmt: skip

# What every script begins with.
PRELUDE = ("prelude", "frames", "places", "limits", "share", "order", "lateness", "blame")
ScriptArg = str | bytes | int | float


def connect(url: str, *, max_connections: int = 64) -> Redis:
    """Makes a client; connects lazily, and reconnects after an outage.

    Args:
        url: redis://, rediss:// or unix:///path.
        max_connections: more commands at a time than this wait for one another, at most
            `CONNECT_TIMEOUT_S`. Shared connections come on top.

    Raises:
        ValueError: not a URL of a Redis.
    """
    pool = _Pool.from_url(
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


Use = Literal["short", "blocking", "large"]
MAX_LARGE = 2  # calls with large replies that a process has outstanding at a time


def shared_connection(redis: Redis, use: Use = "short") -> SharedConnection:
    """One of those of a client which `connect` has made. They raise redis' errors: see
    `in_our_words`.

    Args:
        use: what it is for: calls that are over in an instant, those that wait for something to
            happen, or those with large arguments or replies.
    """
    pool = redis.connection_pool
    assert isinstance(pool, _Pool)
    return pool.shared(use)


class _Pool(BlockingConnectionPool):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._shared: dict[Use, SharedConnection] = {}

    def shared(self, use: Use) -> SharedConnection:
        if use not in self._shared:
            connection = self.make_connection()  # type: ignore[no-untyped-call]
            self._shared[use] = SharedConnection(
                connection,
                timeout_s=CALL_TIMEOUT_S,
                max_unanswered=MAX_LARGE if use == "large" else None,
            )
        return self._shared[use]

    async def disconnect(self, inuse_connections: bool = True) -> None:
        for connection in self._shared.values():
            await connection.aclose()
        await super().disconnect(inuse_connections)


@asynccontextmanager
async def store_call() -> AsyncIterator[None]:
    """Encloses every use of the client: limits it to `CALL_TIMEOUT_S`, and turns what Redis'
    absence or overload raises into `StoreUnavailableError`."""
    with in_our_words:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            yield


class _InOurWords:
    """Turns what Redis' absence or overload raises into `StoreUnavailableError`."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, TimeoutError | RedisTimeoutError | ConnectionError):
            raise StoreUnavailableError from error
        if isinstance(error, ReadOnlyError | OutOfMemoryError) or (
            isinstance(error, ResponseError) and is_server_condition(str(error))
        ):
            raise StoreUnavailableError(
                "the job store takes no writes just now: try again"
            ) from error


in_our_words = _InOurWords()


def is_server_condition(text: str) -> bool:
    """Whether an error reply is about the state of the server, which will pass."""
    return any(condition in f"{text} " for condition in _SERVER_CONDITIONS)


MAX_LOADS = 3  # tries within one call, if Redis has just lost the script


class Scripts:
    """Runs the scripts of `app/store/lua` by their digest, and loads those that Redis lacks."""

    def __init__(self, redis: Redis, prefix: str) -> None:
        self._shared = shared_connection(redis)
        self._prefix = prefix

    async def run(self, name: str, *args: ScriptArg) -> Any:
        """Runs a script, which may be sent twice.

        Raises:
            StoreUnavailableError: Redis does not answer or does not take writes.
        """
        source, digest = load_script(name)
        with in_our_words:
            for _ in range(MAX_LOADS):
                try:
                    return await self._shared.call("EVALSHA", digest, 0, self._prefix, *args)
                except NoScriptError:
                    await self._shared.call("SCRIPT", "LOAD", source)
        raise StoreUnavailableError("the job store loses its scripts: try again")


@cache
def load_script(name: str) -> tuple[str, str]:
    """Reads `lua/{name}.lua`; returns its text after what it uses of what all share, and the text's
    SHA-1.
    """
    folder = files("app.store") / "lua"
    shared = "\n".join((folder / f"{part}.lua").read_text("utf-8") for part in PRELUDE)
    text = _with_what_it_uses((folder / f"{name}.lua").read_text("utf-8"), shared)
    return text, sha1(text.encode(), usedforsecurity=False).hexdigest()


def _with_what_it_uses(script: str, shared: str) -> str:
    """Redis runs a script from its first line on, each time: definitions that nothing mentions
    would cost more than most scripts do.

    Args:
        shared: statements that begin in the first column; most define a name.
    """
    statements = [_Statement.of(text) for text in _STATEMENT.split(_COMMENT.sub("", shared))]
    words, num_words = _words(script), 0
    while len(words) > num_words:  # a definition may use one that comes after it
        num_words = len(words)
        for statement in statements:
            if statement.is_used(words):
                words |= statement.words
    return "".join((*(s.text for s in statements if s.is_used(words)), "\n", script))


class _Statement(NamedTuple):
    text: str
    defined: frozenset[str]  # names; a statement that defines none is always used
    words: frozenset[str]

    @classmethod
    def of(cls, text: str) -> "_Statement":
        definition = _DEFINITION.match(text)
        defined = frozenset(_WORD.findall(definition["names"]) if definition else ())
        return cls(text, defined, frozenset(_words(text)) - defined)

    def is_used(self, words: set[str]) -> bool:
        return not self.defined or not words.isdisjoint(self.defined)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(_COMMENT.sub("", text)))


_WORD = re.compile(r"\w+")
_COMMENT = re.compile(r"--.*")
_STATEMENT = re.compile(r"^(?=local |if |\w+ = )", re.MULTILINE)
_DEFINITION = re.compile(r"(?:local (?:function )?)?(?P<names>\w+(?:, *\w+)*) *(?:\(|=|$)", re.M)


def milliseconds(duration_s: float) -> int:
    return round(duration_s * 1000)


def seconds(time_ms: bytes | None) -> float | None:
    return None if time_ms is None else int(time_ms) / 1000
