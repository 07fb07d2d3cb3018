"""Workers for the tests, and a client that gives them jobs without an API."""

import asyncio
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType

import numpy as np
import psutil
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from app.messages import FINAL_EVENTS, Event, JobState, TokenEvent, Turn
from app.metrics import WorkerMetrics
from app.settings import Settings
from app.store.client import connect
from app.store.event_log import FIRST_EVENT, EventLog
from app.store.frame_store import FrameStore, encode_frames
from app.store.job_queue import JobQueue, JobRecord
from app.store.keys import GROUP, RedisKeys
from app.store.worker_registry import WorkerRegistry
from app.worker.process import CPU_RUNNING_JOBS
from app.worker.worker import Worker
from dycoke_core.config import Priority
from dycoke_core.engine import Engine
from dycoke_core.video import VideoFrames
from tests.integration.fake_engine import FakeEngine
from tests.integration.jobs import cancelled, make_request, with_frames

ROOT = Path(__file__).parent.parent.parent
FRAMES = VideoFrames(
    pixels=np.zeros((1, 8, 8, 3), np.uint8),
    indices=(0,),
    timestamps_s=(0.0,),
    reader="decord",
    warnings=(),
)
PATIENCE_S = 60.0  # for things that must happen, on a machine that may be busy
LONG_LEASE_S = 10 * PATIENCE_S  # runs out only where a test expires it
EXPIRE_LEASES = """
for _, held in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1000, ARGV[2])) do
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, held[1], 'IDLE', ARGV[3], 'JUSTID')
end
"""


class Client:
    """What an API would do for its clients."""

    def __init__(self, redis: Redis, settings: Settings) -> None:
        self.redis = redis
        self.keys = RedisKeys(settings.redis_prefix)
        self.model = settings.model_name
        self.queue = JobQueue(redis, self.keys, result_ttl_s=60)
        self.log = EventLog(redis, self.keys)
        self.frames = FrameStore(redis, self.keys, max_bytes=2**20)
        self.registry = WorkerRegistry(redis, self.keys)

    async def ask(
        self,
        question: str,
        *,
        max_tokens: int = 8,
        timeout_s: float = 60.0,
        temperature: float = 0.0,
        kept_mask: bool = False,
        priority: Priority = "normal",
        deadline_s: float | None = None,
        compression: Mapping[str, object] = MappingProxyType({"policy": "full"}),
        frames: VideoFrames = FRAMES,
    ) -> str:
        job_id = uuid.uuid4().hex
        request = make_request(job_id, timeout_s=timeout_s, model=self.model).model_copy(
            update={
                "messages": [Turn(role="user", content=question)],
                "max_tokens": max_tokens,
                "temperature": temperature,
                "kept_mask": kept_mask,
                "priority": priority,
                "deadline_s": deadline_s,
                "compression": dict(compression),
            }
        )
        await self.queue.reserve(self.model, job_id, max_jobs=1000, lease_s=30)
        await self.queue.create(request)
        request = with_frames(request)
        assert request.frames
        await self.frames.put_and_pin(
            request.frames.digest, encode_frames(frames), job_id, request.cached_video
        )
        assert await self.queue.enqueue(request)
        return job_id

    async def cancel(self, job_id: str) -> bool:
        return await self.queue.end(job_id, JobState.CANCELLED, cancelled(job_id))

    async def follow(self, job_id: str) -> AsyncIterator[Event]:
        """The job's events until its end."""
        after = FIRST_EVENT
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for logged in await self.log.read(job_id, after=after):
                    after = logged.id
                    yield logged.event
                    if isinstance(logged.event, FINAL_EVENTS):
                        return
                await asyncio.sleep(0.01)

    async def events(self, job_id: str) -> list[Event]:
        return [event async for event in self.follow(job_id)]

    async def wait_for_token(self, job_id: str, index: int) -> None:
        async for event in self.follow(job_id):
            if isinstance(event, TokenEvent) and event.index >= index:
                return
        raise AssertionError("the job ended before that token")

    async def wait_for(self, job_id: str, is_so: Callable[[JobRecord], bool]) -> JobRecord:
        record = await self.queue.get(job_id)
        async with asyncio.timeout(PATIENCE_S):
            while not is_so(record):
                await asyncio.sleep(0.02)
                record = await self.queue.get(job_id)
        return record

    async def worker_of(self, job_id: str) -> str:
        """Id of the last worker that took a job."""
        worker: bytes = await self.redis.hget(self.keys.job(job_id), "worker")
        return worker.decode()

    async def expire_leases(self, worker_id: str) -> None:
        """As if a worker that is dead or paused had been so for longer than any lease."""
        idle_ms = int(2 * LONG_LEASE_S * 1000)
        await self.redis.eval(
            EXPIRE_LEASES, 1, self.keys.jobs(self.model), GROUP, worker_id, idle_ms
        )

    async def wait_for_takeover(self, job_id: str) -> None:
        """Expires the leases of the job's worker until another one has taken the job."""
        worker_id = await self.worker_of(job_id)
        async with asyncio.timeout(PATIENCE_S):
            while await self.worker_of(job_id) == worker_id:
                await self.expire_leases(worker_id)  # again: it may just have renewed them
                await asyncio.sleep(0.02)

    async def wait_for_workers(self, number: int) -> None:
        async def are_there() -> bool:
            return len(await self.registry.cards()) == number

        await wait_until(are_there)


@asynccontextmanager
async def client_of(settings: Settings) -> AsyncIterator[Client]:
    assert settings.redis_url
    redis = connect(settings.redis_url)
    yield Client(redis, settings)
    await redis.aclose()


class WorkerProcess:
    """A worker with a fake engine in a process of its own, killed at the end of the block.

    Args:
        image_size: pixels, of the frames that it wants; None: the fake engine's.
    """

    def __init__(self, settings: Settings, child: int = 0, image_size: int | None = None) -> None:
        size = () if image_size is None else (str(image_size),)
        self._process = subprocess.Popen(
            worker_argv(child) + size, cwd=ROOT, env=os.environ | environment(settings)
        )

    def send(self, signum: signal.Signals) -> None:
        self._process.send_signal(signum)

    async def wait(self) -> int:
        """Waits for its end; returns the exit code."""
        return await asyncio.to_thread(self._process.wait, PATIENCE_S)

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
        self._process.wait(PATIENCE_S)


def worker_argv(child: int) -> tuple[str, ...]:
    return (sys.executable, "-m", "tests.integration.fake_worker", str(child))


def environment(settings: Settings) -> dict[str, str]:
    """The variables that make these settings."""
    given = settings.model_dump(exclude_unset=True)
    return {f"DYCOKE_{name.upper()}": str(value) for name, value in given.items()}


async def wait_until(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await is_so():
            await asyncio.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def tokens(events: list[Event]) -> list[TokenEvent]:
    return [event for event in events if isinstance(event, TokenEvent)]


def assert_gapless(events: list[Event]) -> None:
    """Each token event starts where the one before ended; how many tokens share one varies."""
    published = tokens(events)
    starts = [0, *(event.next_index for event in published[:-1])]
    assert [event.index for event in published] == starts


def token_ids(events: list[Event]) -> list[int]:
    return [token_id for event in tokens(events) for token_id in event.token_ids]


class RunningWorker:
    """A worker and what a test may look at: its engine, its metrics, its result."""

    def __init__(
        self, settings: Settings, redis: Redis, name: str, engine: Engine | None = None
    ) -> None:
        self.engine = FakeEngine(settings.max_running_jobs or CPU_RUNNING_JOBS)
        self.registry = CollectorRegistry()
        self.worker = Worker(
            settings,
            redis,
            lambda: engine or self.engine,
            WorkerMetrics(self.registry, model=settings.model_name),
            worker_id=name,
        )
        self.task = asyncio.create_task(self.worker.run())

    async def stop(self) -> bool:
        self.worker.stop()
        async with asyncio.timeout(60):
            return await self.task

    def metric(self, name: str, **labels: str) -> float | None:
        labels = {"model": "dycoke-tiny", **labels}
        return self.registry.get_sample_value(f"dycoke_{name}", labels)


@asynccontextmanager
async def running(
    settings: Settings, name: str = "worker-a", engine: Engine | None = None
) -> AsyncIterator[RunningWorker]:
    """Args:
    engine: a real one; None: a fake one.
    """
    assert settings.redis_url
    redis = connect(settings.redis_url)
    running = RunningWorker(settings, redis, name, engine)
    try:
        yield running
    finally:
        running.task.cancel()
        await asyncio.gather(running.task, return_exceptions=True)
        assert await asyncio.to_thread(running.worker.close)
        await redis.aclose()
