"""What jobs go through on their way into the queue: a real Redis and video store, and readers that
obey the test."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from app.api.post.cancelling import Cancellations
from app.api.post.reader_slots import ReaderSlots
from app.api.post.reading import FrameReading
from app.api.post.second_try import SecondTryReaders
from app.metrics import ApiMetrics
from app.process_table import ProcessTable
from app.store.frame_store import FrameStore
from app.store.job_queue import JobQueue
from app.store.keys import RedisKeys
from app.tracing import Tracing
from app.video_store import VideoStore
from dycoke_core.video import FrameReaders
from tests.app.video_store.videos import open_store
from tests.integration.api import FakeReaders


@pytest.fixture
def fake_readers() -> FakeReaders:
    return FakeReaders()


@pytest.fixture
def tried_readers(fake_readers: FakeReaders, process_table: ProcessTable) -> SecondTryReaders:
    slots = ReaderSlots(process_table.take_row(0), 2)
    return SecondTryReaders(cast(FrameReaders, fake_readers), slots)


@pytest.fixture
async def videos(tmp_path: Path) -> VideoStore:
    return await open_store(tmp_path)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def frame_store(redis: Redis, keys: RedisKeys) -> FrameStore:
    return FrameStore(redis, keys, max_bytes=2**20)


@pytest.fixture
async def reading(
    queue: JobQueue,
    frame_store: FrameStore,
    tried_readers: SecondTryReaders,
    registry: CollectorRegistry,
) -> AsyncIterator[FrameReading]:
    reading = FrameReading(
        queue,
        frame_store,
        tried_readers,
        ApiMetrics(registry),
        Tracing(),
        max_held_bytes=2**20,
        patience_s=0.0,
    )
    yield reading
    await reading.aclose()


@pytest.fixture
async def cancellations(queue: JobQueue, reading: FrameReading) -> AsyncIterator[Cancellations]:
    cancellations = Cancellations(queue, reading)
    yield cancellations
    await cancellations.aclose()
