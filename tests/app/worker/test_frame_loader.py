"""A worker drops a job's pixels once its engine has encoded them, and fetches them where they are
needed again; how a job ends that waits for them."""

import asyncio
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from redis.asyncio import Redis

from app.errors import StoreUnavailableError
from app.messages import DoneEvent, ErrorEvent, Event, JobState
from app.settings import Settings
from app.store.forgotten_videos import ForgottenVideos
from app.store.frame_store import FrameStore, encode_frames
from app.store.keys import RedisKeys
from app.worker import lease_keeper
from dycoke_core.config import EngineConfig
from dycoke_core.engine import Engine
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.video import VideoFrames
from tests.engine.recording import moving_square
from tests.garbage import collection_paused
from tests.integration.fake_engine import answer
from tests.integration.workers import (
    FRAMES,
    Client,
    RunningWorker,
    running,
    token_ids,
    wait_until,
)

EVICTED = "sleep:0.01 evicted"


@dataclass
class Store:
    """What workers got out of the frame store, and when they get the next."""

    blobs: list[bytes | None] = field(default_factory=list)
    num_asked: int = 0
    num_free: int = 10**9  # calls that wait for nothing
    may_get: asyncio.Event = field(default_factory=asyncio.Event)  # what later ones wait for
    num_outages: int = 0  # calls to come that find Redis away

    def references(self) -> int:
        """To the newest blob, but for this store's own."""
        return sys.getrefcount(self.blobs[-1]) - 2  # the list's, and the argument

    async def wait_until_let_go(self) -> None:
        async def is_let_go() -> bool:
            return self.references() == 0

        await wait_until(is_let_go)

    async def wait_until_asked(self, number: int) -> None:
        async def is_asked() -> bool:
            return self.num_asked == number

        await wait_until(is_asked)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store of all workers."""
    store = Store()
    get = FrameStore.get

    async def watched_get(this: FrameStore, digest: str) -> bytes | None:
        store.num_asked += 1
        if store.num_asked > store.num_free:
            await store.may_get.wait()
        if store.num_outages:
            store.num_outages -= 1
            raise StoreUnavailableError("the job store does not answer")
        store.blobs.append(await get(this, digest))
        return store.blobs[-1]

    monkeypatch.setattr(FrameStore, "get", watched_get)
    return store


async def ask_and_evict(
    client: Client, store: Store, worker: RunningWorker, *, max_tokens: int = 40
) -> str:
    """A job that waits for its frames, which do not come until `may_get` is set."""
    store.num_free = store.num_asked + 1
    job_id = await client.ask(EVICTED, max_tokens=max_tokens)
    await store.wait_until_asked(store.num_free + 1)
    assert worker.engine.waiting_for_frames == (f"{job_id}#1",)
    return job_id


async def assert_all_gone(worker: RunningWorker) -> None:
    async def is_empty() -> bool:
        return not worker.engine.without_frames and not worker.engine.sequences

    await wait_until(is_empty)


def assert_whole(events: list[Event]) -> None:
    assert isinstance(events[-1], DoneEvent)
    assert token_ids(events) == answer(EVICTED, 40)


async def test_a_running_job_holds_no_pixels(
    settings: Settings, client: Client, store: Store
) -> None:
    """Nothing waits for a garbage collection either."""
    with collection_paused():
        async with running(settings):
            job_id = await client.ask("sleep:0.01", max_tokens=1000)
            await client.wait_for_token(job_id, 1)
            await store.wait_until_let_go()
            assert (await client.queue.get(job_id)).state is JobState.RUNNING
            assert await client.cancel(job_id)


async def test_with_a_real_engine_a_running_job_holds_none_either(
    settings: Settings, client: Client, store: Store, tiny_model: LlavaOnevision
) -> None:
    pixels = moving_square(1, num_frames=2, size=tiny_model.image_size)
    frames = VideoFrames(pixels, (0, 1), (0.0, 0.5), reader="decord", warnings=())
    real = Engine(tiny_model, EngineConfig(device="cpu", dtype="float32"))
    with collection_paused():
        async with running(settings, engine=real):
            job_id = await client.ask("why?", max_tokens=1000, frames=frames)
            await client.wait_for_token(job_id, 1)
            await store.wait_until_let_go()
            assert (await client.queue.get(job_id)).state is JobState.RUNNING
            assert await client.cancel(job_id)


async def test_pixels_of_a_job_that_the_engine_refuses_go_with_it(
    settings: Settings, client: Client, store: Store
) -> None:
    with collection_paused():
        async with running(settings):
            await client.events(await client.ask("refuse"))
            await store.wait_until_let_go()


async def test_frames_come_again_where_the_engine_needs_them_again(
    settings: Settings, client: Client, store: Store
) -> None:
    async with running(settings) as worker:
        job_id = await ask_and_evict(client, store, worker)
        other = await client.ask("what?", max_tokens=4)
        store.may_get.set()  # of the other's, too
        assert token_ids(await client.events(other)) == answer("what?", 4)
        assert_whole(await client.events(job_id))
    assert store.num_asked == 3


async def test_frames_that_came_again_are_let_go_again(
    settings: Settings, client: Client, store: Store
) -> None:
    with collection_paused():
        async with running(settings) as worker:
            job_id = await ask_and_evict(client, store, worker, max_tokens=1000)
            store.may_get.set()
            await client.wait_for_token(job_id, 5)
            await store.wait_until_let_go()
            assert (await client.queue.get(job_id)).state is JobState.RUNNING
            assert await client.cancel(job_id)


async def test_jobs_that_run_go_on_while_one_waits_for_its_frames(
    settings: Settings, client: Client, store: Store
) -> None:
    async with running(settings) as worker:
        other = await client.ask("sleep:0.02 other", max_tokens=60)
        await client.wait_for_token(other, 0)
        job_id = await ask_and_evict(client, store, worker)
        assert token_ids(await client.events(other)) == answer("sleep:0.02 other", 60)
        assert worker.engine.waiting_for_frames == (f"{job_id}#1",)
        store.may_get.set()
        assert_whole(await client.events(job_id))


async def test_frames_are_fetched_again_once_redis_is_back(
    settings: Settings, client: Client, store: Store
) -> None:
    async with running(settings) as worker:
        job_id = await ask_and_evict(client, store, worker)
        store.num_outages = 2
        store.may_get.set()
        assert_whole(await client.events(job_id))
    assert store.num_asked == 4


async def test_frames_that_are_gone_end_their_job_alone(
    settings: Settings, client: Client, store: Store, redis: Redis, keys: RedisKeys
) -> None:
    async with running(settings) as worker:
        other = await client.ask("sleep:0.02 other", max_tokens=60)
        await client.wait_for_token(other, 0)
        job_id = await ask_and_evict(client, store, worker)
        await redis.delete(keys.frames("frames"))
        store.may_get.set()
        *said, last = await client.events(job_id)
        assert isinstance(last, ErrorEvent)
        assert (last.code, last.retryable) == ("store_unavailable", True)
        assert token_ids(said) == answer(EVICTED, 2)
        assert token_ids(await client.events(other)) == answer("sleep:0.02 other", 60)
        await assert_all_gone(worker)


async def test_a_blob_that_cannot_be_read_ends_its_job(
    settings: Settings, client: Client, store: Store, redis: Redis, keys: RedisKeys
) -> None:
    async with running(settings) as worker:
        job_id = await ask_and_evict(client, store, worker)
        await redis.set(keys.frames("frames"), b"\x00\x00\x00\x02{}")
        store.may_get.set()
        *_, last = await client.events(job_id)
        assert isinstance(last, ErrorEvent) and last.code == "engine_error"
        await assert_all_gone(worker)


async def test_a_job_that_waits_for_its_frames_can_be_cancelled(
    settings: Settings, client: Client, store: Store
) -> None:
    async with running(settings) as worker:
        job_id = await ask_and_evict(client, store, worker)
        assert await client.cancel(job_id)
        await assert_all_gone(worker)
        store.may_get.set()
        assert token_ids(await client.events(await client.ask("next"))) == answer("next", 8)
    assert store.num_asked == 3


async def test_a_deadline_ends_the_wait_for_frames(
    settings: Settings, client: Client, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(settings) as worker:
        job_id = await ask_and_evict(client, store, worker)
        deadline_at_s = (await client.queue.get(job_id)).request.deadline_at_s
        later = SimpleNamespace(time=lambda: deadline_at_s + 0.1)
        monkeypatch.setattr(lease_keeper, "time", later)
        *_, last = await client.events(job_id)
        assert isinstance(last, ErrorEvent) and last.code == "deadline_exceeded"
        await assert_all_gone(worker)


async def test_another_worker_goes_on_when_one_dies_that_waits_for_frames(
    settings: Settings, client: Client, store: Store
) -> None:
    async with running(settings) as worker:
        job_id = await ask_and_evict(client, store, worker)
        worker.task.cancel()
    store.may_get.set()
    async with running(settings, "worker-b"):
        events = await client.events(job_id)
    assert_whole(events)
    assert isinstance(events[-1], DoneEvent) and events[-1].attempts == 2


async def test_a_drain_hands_back_a_job_that_waits_for_its_frames(
    settings: Settings, client: Client, store: Store
) -> None:
    hasty = settings.model_copy(update={"drain_timeout_s": 0.1})
    async with running(hasty) as worker:
        job_id = await ask_and_evict(client, store, worker)
        assert await worker.stop()
    assert (await client.queue.get(job_id)).state is JobState.QUEUED
    store.may_get.set()
    async with running(settings, "worker-b"):
        assert_whole(await client.events(job_id))


async def test_the_store_keeps_frames_for_as_long_as_their_job_lives(
    settings: Settings, client: Client, store: Store, redis: Redis, keys: RedisKeys
) -> None:
    """Though their video is deleted, others need the room, and the job changes hands."""
    hasty = settings.model_copy(update={"drain_timeout_s": 0.1})
    crowded = FrameStore(redis, keys, max_bytes=3 * len(encode_frames(FRAMES)))
    async with running(hasty) as worker:
        job_id = await ask_and_evict(client, store, worker)
        video = (await client.queue.get(job_id)).request.cached_video
        await ForgottenVideos(redis, keys).forget(video)
        for number in range(5):
            await crowded.put_and_pin(f"{number}", encode_frames(FRAMES), "nobody", "another")
        assert await worker.stop()
    assert await redis.pttl(keys.frames("frames")) == -1, "it has no time to live"
    store.may_get.set()
    async with running(settings, "worker-b"):
        assert_whole(await client.events(job_id))
    assert not await redis.exists(keys.frames("frames")), "it went with the job"
