"""Frames by content: shared, pinned while needed, evicted under a budget."""

import asyncio

import numpy as np
import pytest
from redis.asyncio import Redis

from app.errors import StoreUnavailableError
from app.messages import JobState
from app.store.frame_store import FrameStore, decode_frames, encode_frames, frames_digest
from app.store.job_leases import JobLeases
from app.store.job_queue import JobQueue
from app.store.keys import RedisKeys
from dycoke_core.video import SAMPLINGS, VideoFrames
from tests.integration.jobs import MODEL, cancelled, make_request

BLOB_BYTES = 400


@pytest.fixture
def queue(redis: Redis, keys: RedisKeys) -> JobQueue:
    return JobQueue(redis, keys, result_ttl_s=60)


@pytest.fixture
def store(redis: Redis, keys: RedisKeys) -> FrameStore:
    """Has room for two blobs."""
    return FrameStore(redis, keys, max_bytes=2 * BLOB_BYTES)


async def reading_job(queue: JobQueue, job_id: str) -> str:
    await queue.reserve(MODEL, job_id, max_jobs=100, lease_s=30)
    return await queue.create(make_request(job_id))


async def cancel(queue: JobQueue, job_id: str) -> None:
    assert await queue.end(job_id, JobState.CANCELLED, cancelled(job_id))


def blob(letter: str) -> bytes:
    """A blob of `BLOB_BYTES`."""
    empty = VideoFrames(np.zeros((0, 8, 8, 3), np.uint8), (), (), "decord", ())
    return encode_frames(empty).ljust(BLOB_BYTES, letter.encode())


async def put(store: FrameStore, digest: str, job_id: str = "none") -> None:
    await store.put_and_pin(digest, blob(digest), job_id)
    await asyncio.sleep(0.002)  # uses are ordered by the millisecond


async def stored(store: FrameStore) -> str:
    return "".join([letter for letter in "abcde" if await store.get(letter)])


async def test_blob_comes_back_as_it_was(store: FrameStore) -> None:
    assert await store.get("a") is None
    assert await store.pin("a", "j") is None
    await put(store, "a")
    assert await store.get("a") == blob("a")


async def test_least_recently_used_blob_goes_first(store: FrameStore) -> None:
    await put(store, "a")
    await put(store, "b")
    assert await store.pin("a", "not live")
    await asyncio.sleep(0.002)
    await put(store, "c")
    assert await stored(store) == "ac"


async def test_pinned_blobs_stay_until_their_job_ends(store: FrameStore, queue: JobQueue) -> None:
    await put(store, "a", await reading_job(queue, "j1"))
    await put(store, "b", await reading_job(queue, "j2"))
    with pytest.raises(StoreUnavailableError):
        await put(store, "c")
    assert await stored(store) == "ab"
    await cancel(queue, "j1")
    await put(store, "c")
    assert await stored(store) == "bc"


async def test_blob_is_kept_while_any_of_its_jobs_is_live(
    store: FrameStore, queue: JobQueue
) -> None:
    await put(store, "a", await reading_job(queue, "j1"))
    assert await store.pin("a", await reading_job(queue, "j2"))
    await cancel(queue, "j1")
    for other in "bcd":
        await put(store, other)
    assert await stored(store) == "ad"
    await cancel(queue, "j2")
    for other in "bc":
        await put(store, other)
    assert await stored(store) == "bc"


async def test_pin_of_a_job_that_is_gone_counts_for_nothing(
    store: FrameStore, queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    await put(store, "a", await reading_job(queue, "j"))
    await redis.zrem(keys.live, "j")
    for other in "bc":
        await put(store, other)
    assert await stored(store) == "bc"
    assert not await redis.exists(keys.frame_pins("a"))


async def test_storing_twice_counts_once(store: FrameStore, redis: Redis, keys: RedisKeys) -> None:
    await put(store, "a")
    await put(store, "a")
    await put(store, "b")
    assert await stored(store) == "ab"
    assert await redis.get(keys.frame_bytes) == str(2 * BLOB_BYTES).encode()


async def test_lost_blob_does_not_keep_its_share_of_the_budget(
    store: FrameStore, redis: Redis, keys: RedisKeys
) -> None:
    await put(store, "a")
    await redis.delete(keys.frames("a"))
    assert await store.get("a") is None
    await put(store, "a")
    await put(store, "b")
    assert await stored(store) == "ab"


async def test_blob_larger_than_the_budget_evicts_nothing(store: FrameStore) -> None:
    await put(store, "a")
    with pytest.raises(StoreUnavailableError):
        await store.put_and_pin("b", bytes(2 * BLOB_BYTES + 1), "none")
    assert await stored(store) == "a"


async def test_budget_holds_under_concurrent_writers(
    store: FrameStore, redis: Redis, keys: RedisKeys
) -> None:
    await asyncio.gather(*(store.put_and_pin(f"{i}", bytes(BLOB_BYTES), "none") for i in range(30)))
    sizes = await redis.hgetall(keys.frame_sizes)
    assert len(sizes) == 2
    assert await redis.get(keys.frame_bytes) == str(2 * BLOB_BYTES).encode()


async def test_job_with_frames_leaves_no_pin_behind(
    store: FrameStore, queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    leases = JobLeases(redis, keys, model=MODEL, worker_id="w", result_ttl_s=60)
    await leases.ensure_group()
    await put(store, "a", await reading_job(queue, "j"))
    assert await redis.smembers(keys.frame_pins("a")) == {b"j"}
    await cancel(queue, "j")
    assert not await redis.exists(keys.frame_pins("a"))


async def test_frames_are_described_without_their_pixels(redis: Redis, keys: RedisKeys) -> None:
    store = FrameStore(redis, keys, max_bytes=10_000)
    frames = VideoFrames(np.zeros((2, 8, 8, 3), np.uint8), (0, 5), (0.0, 0.2), "pyav", ("cut",))
    await store.put_and_pin("a", encode_frames(frames), "none")
    header = await store.pin("a", "none")
    assert header is not None
    assert (header.shape, header.indices) == ((2, 8, 8, 3), (0, 5))
    assert (header.timestamps_s, header.reader, header.warnings) == ((0.0, 0.2), "pyav", ("cut",))


def test_frames_survive_encoding() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    frames = VideoFrames(
        pixels=pixels,
        indices=(0, 5, 9),
        timestamps_s=(0.0, 0.2, 0.36),
        reader="pyav",
        warnings=("cut off",),
    )
    decoded = decode_frames(encode_frames(frames))
    assert np.array_equal(decoded.pixels, pixels)
    assert decoded.pixels.flags.writeable and decoded.pixels.dtype == np.uint8
    assert (decoded.indices, decoded.timestamps_s) == (frames.indices, frames.timestamps_s)
    assert (decoded.reader, decoded.warnings) == (frames.reader, frames.warnings)


@pytest.mark.parametrize("broken", [b"", b"\x00\x00\x00\x02{}", b"\x00\x00\x00\x09not json!"])
def test_what_is_no_blob_is_refused(broken: bytes) -> None:
    with pytest.raises(ValueError):
        decode_frames(broken)


def test_digest_depends_on_everything_that_the_pixels_depend_on() -> None:
    digests = {
        frames_digest(
            video, num_frames=frames, image_size=size, start_s=start, end_s=end, sampling=sampling
        )
        for video in ("v", "w")
        for frames in (1, 2)
        for size in (8, 16)
        for start in (None, 0.0, 1.0)
        for end in (None, 2.0)
        for sampling in SAMPLINGS
    }
    assert len(digests) == 96
