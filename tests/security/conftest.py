"""One service for all of the review, and the count of what was tried on it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.store.keys import RedisKeys
from tests.integration.conftest import RedisServer, own_redis_server, redis_server
from tests.security.service import Service, running
from tests.security.tally import VARIABLE, Tally
from tests.video.conftest import hostile, video_fd

__all__ = ["hostile", "own_redis_server", "redis_server", "video_fd"]  # fixtures


@pytest.fixture(scope="session")
def tally() -> Iterator[Tally]:
    tally = Tally()
    yield tally
    if path := os.environ.get(VARIABLE):
        tally.write(Path(path))


@pytest.fixture(scope="session")
def service(
    redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("review")
    with running(redis_server.url, RedisKeys("review"), folder) as service:
        yield service
