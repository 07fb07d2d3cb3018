"""A real Redis for tests of single modules: one server, a key prefix per test."""

from tests.integration.conftest import (
    clock,
    keys,
    leases,
    log,
    other_leases,
    own_redis_server,
    queue,
    redis,
    redis_server,
    sets,
)

__all__ = [
    "clock",
    "keys",
    "leases",
    "log",
    "other_leases",
    "own_redis_server",
    "queue",
    "redis",
    "redis_server",
    "sets",
]
