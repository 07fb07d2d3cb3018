"""Frames by content: shared, pinned while needed, evicted under a budget."""

import asyncio
from typing import Any, get_args

import numpy as np
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError

from app.errors import FrameStoreFullError, JobNotFoundError
from app.keys.entries import ANONYMOUS
from app.messages import JobState
from app.store.client import connect
from app.store.forgotten_videos import ForgottenVideos
from app.store.frame_store import (
    FramesHeader,
    FrameStore,
    decode_frames,
    encode_frames,
    frames_digest,
    max_blob_bytes,
    parse_header,
)
from app.store.job_leases import JobLeases
from app.store.job_queue import Created, ExpectedFrames, JobQueue, NeededFrames
from app.store.keys import RedisKeys
from app.store.shared_connection import SharedConnection
from dycoke_core.model_frames import Resizing, Spread
from dycoke_core.video import SAMPLINGS, FrameSpec, VideoFrames
from tests.integration.conftest import RedisServer
from tests.integration.jobs import MODEL, cancelled, make_request

BLOB_BYTES = 400
VIDEO = "video"


@pytest.fixture
def store(redis: Redis, keys: RedisKeys) -> FrameStore:
    """Has room for two blobs."""
    return FrameStore(redis, keys, max_bytes=2 * BLOB_BYTES)


async def reading_job(queue: JobQueue, job_id: str) -> str:
    await queue.reserve(MODEL, job_id, max_jobs=100, lease_s=30)
    return (await queue.create(make_request(job_id))).job_id


async def cancel(queue: JobQueue, job_id: str) -> None:
    assert await queue.end(job_id, JobState.CANCELLED, cancelled(job_id))


def blob(letter: str) -> bytes:
    """A blob of `BLOB_BYTES`."""
    empty = VideoFrames(np.zeros((0, 8, 8, 3), np.uint8), (), (), "decord", ())
    return encode_frames(empty).ljust(BLOB_BYTES, letter.encode())


async def put(store: FrameStore, digest: str, job_id: str = "none") -> None:
    await store.put_and_pin(digest, blob(digest), job_id, VIDEO)
    await asyncio.sleep(0.002)  # uses are ordered by the millisecond


async def stored(store: FrameStore) -> str:
    return "".join([letter for letter in "abcde" if await store.get(letter)])


async def test_storing_that_is_cancelled_leaves_nothing_beyond_the_budget(
    own_redis_server: RedisServer, keys: RedisKeys
) -> None:
    redis, other = connect(own_redis_server.url), connect(own_redis_server.url)
    store = FrameStore(redis, keys, max_bytes=2 * BLOB_BYTES)
    await other.execute_command("CLIENT PAUSE", 60_000, "WRITE")
    storing = asyncio.create_task(store.put_and_pin("digest", blob("d"), "job", VIDEO))
    async with asyncio.timeout(20):
        while "set" not in [client["cmd"] for client in await other.client_list()]:
            await asyncio.sleep(0.01)
    storing.cancel()
    await asyncio.gather(storing, return_exceptions=True)
    await other.execute_command("CLIENT UNPAUSE")
    async with asyncio.timeout(20):  # by itself it goes after a minute
        while not await is_stored_and_dropped(other, keys.frame_upload("job")):
            await asyncio.sleep(0.01)
    for client in (redis, other):
        await client.aclose()


async def is_stored_and_dropped(redis: Redis, key: str) -> bool:
    """Whether something has been set, and this is not there."""
    return "cmdstat_set" in await redis.info("commandstats") and not await redis.exists(key)


async def test_blob_comes_back_as_it_was(store: FrameStore) -> None:
    assert await store.get("a") is None
    assert await store.pin("a", "j") is None
    await put(store, "a")
    assert await store.get("a") == blob("a")


async def test_blob_that_has_come_stays_when_the_connection_breaks_behind_it(
    store: FrameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = SharedConnection.call

    async def broken_after_get(self: SharedConnection, *args: str | bytes | int | float) -> Any:
        if args[0] == "PING":
            raise ConnectionError("the connection is gone")
        return await call(self, *args)

    await put(store, "a")
    monkeypatch.setattr(SharedConnection, "call", broken_after_get)
    assert await store.get("a") == blob("a")


async def test_blob_that_has_come_waits_for_no_other(
    store: FrameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes behind it on the connection may be the blobs of dozens of jobs."""
    call = SharedConnection.call

    async def only_blobs_come(self: SharedConnection, *args: str | bytes | int | float) -> Any:
        if args[0] == "PING":
            await asyncio.Event().wait()
        return await call(self, *args)

    await put(store, "a")
    monkeypatch.setattr(SharedConnection, "call", only_blobs_come)
    async with asyncio.timeout(20):
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
    with pytest.raises(FrameStoreFullError):
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
    with pytest.raises(FrameStoreFullError):
        await store.put_and_pin("b", bytes(2 * BLOB_BYTES + 1), "none", VIDEO)
    assert await stored(store) == "a"


async def test_budget_holds_under_concurrent_writers(
    store: FrameStore, redis: Redis, keys: RedisKeys
) -> None:
    await asyncio.gather(
        *(store.put_and_pin(f"{i}", bytes(BLOB_BYTES), f"none{i}", VIDEO) for i in range(30))
    )
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
    await store.put_and_pin("a", encode_frames(frames), "none", VIDEO)
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
    assert not decoded.pixels.flags.writeable and decoded.pixels.dtype == np.uint8
    assert (decoded.indices, decoded.timestamps_s) == (frames.indices, frames.timestamps_s)
    assert (decoded.reader, decoded.warnings) == (frames.reader, frames.warnings)


@pytest.mark.parametrize("broken", [b"", b"\x00\x00\x00\x02{}", b"\x00\x00\x00\x09not json!"])
def test_what_is_no_blob_is_refused(broken: bytes) -> None:
    with pytest.raises(ValueError):
        decode_frames(broken)


def test_digest_depends_on_everything_that_the_pixels_depend_on() -> None:
    digests = {
        frames_digest(
            video,
            num_frames=frames,
            image_size=size,
            start_s=start,
            end_s=end,
            sampling=sampling,
            spread=spread,
            resizing=resizing,
        )
        for video in ("v", "w")
        for frames in (1, 2)
        for size in (8, 16)
        for start in (None, 0.0, 1.0)
        for end in (None, 2.0)
        for sampling in SAMPLINGS
        for spread in get_args(Spread)
        for resizing in get_args(Resizing)
    }
    assert len(digests) == 3 * 3 * 96


# --- deleted videos ---


async def test_frames_go_with_their_video_and_no_others_do(
    store: FrameStore, redis: Redis, keys: RedisKeys
) -> None:
    await put(store, "a")
    await store.put_and_pin("b", blob("b"), "none", "other")
    await ForgottenVideos(redis, keys).forget(VIDEO)
    assert await stored(store) == "b"
    assert await redis.get(keys.frame_bytes) == str(BLOB_BYTES).encode()
    assert await redis.hgetall(keys.frame_videos) == {b"b": b"other"}
    assert not await redis.exists(keys.video_frames(VIDEO), keys.frame_pins("a"))


async def test_frames_of_a_deleted_video_stay_for_live_jobs_and_go_with_the_last(
    store: FrameStore, queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    forgotten = ForgottenVideos(redis, keys)
    for job_id in ("one", "two", "late"):
        await reading_job(queue, job_id)
    await put(store, "a", "one")
    await store.pin("a", "two")
    await forgotten.forget(VIDEO)
    assert await stored(store) == "a"
    await cancel(queue, "one")
    assert await stored(store) == "a"
    await cancel(queue, "two")
    assert await stored(store) == ""
    await put(store, "b", "late")  # it was being read all the while
    assert await stored(store) == "b"
    await cancel(queue, "late")
    await put(store, "c", "late")  # a reader that does not know yet
    assert await stored(store) == ""
    assert await redis.get(keys.frame_bytes) == b"0"


async def test_video_that_is_uploaded_again_is_kept_again(
    store: FrameStore, queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    forgotten = ForgottenVideos(redis, keys)
    await forgotten.forget(VIDEO)
    await forgotten.keep(VIDEO)
    await reading_job(queue, "j")
    await put(store, "a", "j")
    await cancel(queue, "j")
    assert await stored(store) == "a"


async def test_evicted_frames_leave_no_name_behind(
    store: FrameStore, redis: Redis, keys: RedisKeys
) -> None:
    for letter in "abc":
        await put(store, letter)
    assert await redis.smembers(keys.video_frames(VIDEO)) == {b"b", b"c"}
    assert await redis.hkeys(keys.frame_videos) == [b"b", b"c"]


async def test_job_about_stored_frames_is_queued_as_it_is_created(
    queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    store = FrameStore(redis, keys, max_bytes=10_000)
    frames = VideoFrames(np.zeros((1, 8, 8, 3), np.uint8), (0,), (0.0,), "decord", ())
    await store.put_and_pin("d", encode_frames(frames), "none", "video")

    async def create(job_id: str, expected: bytes | None) -> Created:
        await queue.reserve(MODEL, job_id, max_jobs=100, lease_s=30)
        ready = make_request(job_id).model_copy(update={"seed": 7})
        return await queue.create(
            make_request(job_id),
            frames=NeededFrames("d"),
            expected=ExpectedFrames(expected, ready) if expected else None,
        )

    first = await create("first", None)
    assert not first.is_queued and parse_header(first.found).indices == (0,)
    other = await create("other", first.found + b" ")
    assert not other.is_queued and other.found == first.found, "they are not as expected"
    second = await create("second", first.found)
    assert second.is_queued
    record = await queue.get("second")
    assert (record.state, record.request.seed) == (JobState.QUEUED, 7)
    assert record.position == 0 and record.queued_at_s is not None
    assert await redis.smembers(keys.frame_pins("d")) == {b"first", b"other", b"second"}
    assert await redis.zrange(keys.places(MODEL), 0, -1) == [b"first", b"other"]
    assert (await queue.depth(MODEL)).waiting == 3
    again = await queue.create(make_request("second"), frames=NeededFrames("d"))
    assert again.job_id == "second" and not again.found, "a retry creates nothing"
    await redis.delete(keys.frames("d"))
    third = await create("third", first.found)
    assert not third.is_queued and third.found == b""


# --- reservations: what a job's frames will take, before they are read ---


async def create(queue: JobQueue, job_id: str, digest: str, num_bytes: int = BLOB_BYTES) -> Created:
    await queue.reserve(MODEL, job_id, max_jobs=100, lease_s=30)
    frames = NeededFrames(digest, num_bytes, max_bytes=2 * BLOB_BYTES)
    return await queue.create(make_request(job_id), frames=frames)


async def reserved(redis: Redis, keys: RedisKeys) -> int:
    sizes = await redis.hvals(keys.frame_sizes)
    total = int(await redis.get(keys.frame_bytes) or 0)
    assert total == sum(map(int, sizes))
    return total


async def test_job_whose_frames_have_no_room_is_not_created(
    store: FrameStore, queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    for letter in "ab":
        await create(queue, f"j{letter}", letter)
    assert await reserved(redis, keys) == 2 * BLOB_BYTES
    with pytest.raises(FrameStoreFullError):
        await create(queue, "jc", "c")
    with pytest.raises(JobNotFoundError):
        await queue.get("jc")
    await create(queue, "again", "a")  # about frames that are being read
    assert await reserved(redis, keys) == 2 * BLOB_BYTES
    for job_id in ("ja", "jb"):
        await cancel(queue, job_id)
    assert await reserved(redis, keys) == BLOB_BYTES, "one more waits for the first ones"
    await create(queue, "jc", "c")
    for job_id in ("again", "jc"):
        await cancel(queue, job_id)
    assert await reserved(redis, keys) == 0
    for left in (keys.frame_sizes, keys.frame_videos, keys.frame_uses, keys.video_frames(VIDEO)):
        assert not await redis.exists(left)


# --- shares of the budget: what each key's live jobs hold ---

SHARED_BYTES = 8 * BLOB_BYTES  # six of them open to all keys


async def create_for(
    queue: JobQueue, owner: str, job_id: str, digest: str, num_bytes: int = BLOB_BYTES
) -> None:
    await queue.reserve(MODEL, job_id, max_jobs=100, lease_s=30, owner=owner)
    frames = NeededFrames(digest, num_bytes, max_bytes=SHARED_BYTES)
    request = make_request(job_id).model_copy(update={"owner": owner})
    await queue.create(request, frames=frames)


async def test_key_that_fills_the_budget_leaves_room_for_the_others(
    queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    for number in range(6):
        await create_for(queue, "alice", f"a{number}", f"alice-{number}")
    with pytest.raises(FrameStoreFullError):
        await create_for(queue, "alice", "a6", "alice-6")
    await create_for(queue, "alice", "again", "alice-0")  # which is hers already
    await create_for(queue, "bob", "b0", "bob-0")
    with pytest.raises(FrameStoreFullError):
        await create_for(queue, "bob", "b1", "bob-1")  # the last place is for a third
    await create_for(queue, "carol", "c0", "carol-0")
    assert await reserved(redis, keys) == SHARED_BYTES
    with pytest.raises(FrameStoreFullError):
        await create_for(queue, "dave", "d0", "dave-0")
    for number in range(4):
        await cancel(queue, f"a{number}")
    assert await reserved(redis, keys) == 5 * BLOB_BYTES, "another job waits for the first one"
    await create_for(queue, "bob", "b2", "bob-2")


async def test_frames_that_are_stored_count_for_the_key_that_needs_them(
    queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    store = FrameStore(redis, keys, max_bytes=SHARED_BYTES)
    for letter in "abcdefgh":
        await put(store, letter)
    for letter in "abcdef":
        await create_for(queue, "alice", f"a-{letter}", letter)
    with pytest.raises(FrameStoreFullError):
        await create_for(queue, "alice", "a-g", "g")
    await create_for(queue, "bob", "b-new", "new")  # which evicts one that no job needs
    assert await reserved(redis, keys) == SHARED_BYTES


async def test_stored_frames_count_as_they_are_and_not_as_they_might_be(
    queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    """Where a video's headers give no size, the most that its frames may have is reserved."""
    store = FrameStore(redis, keys, max_bytes=SHARED_BYTES)
    await put(store, "s")
    await create_for(queue, "alice", "a0", "alice-0")
    await create_for(queue, "alice", "a1", "s", num_bytes=SHARED_BYTES)
    for number in range(2, 6):
        await create_for(queue, "alice", f"a{number}", f"alice-{number}")
    with pytest.raises(FrameStoreFullError):
        await create_for(queue, "alice", "a6", "alice-6")


async def test_without_keys_the_whole_budget_is_everybodys(queue: JobQueue) -> None:
    for number in range(8):
        await create_for(queue, ANONYMOUS, f"j{number}", str(number))
    with pytest.raises(FrameStoreFullError):
        await create_for(queue, ANONYMOUS, "j8", "8")


async def test_reservation_becomes_what_is_stored(
    store: FrameStore, queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    await put(store, "e")
    await create(queue, "j", "a", num_bytes=2 * BLOB_BYTES)
    assert await stored(store) == "", "frames that no job needs make room for it"
    await put(store, "a", "j")
    assert await reserved(redis, keys) == BLOB_BYTES
    assert not await redis.exists(keys.frame_upload("j"))
    assert await redis.pttl(keys.frames("a")) == -1
    await cancel(queue, "j")
    assert await stored(store) == "a" and await reserved(redis, keys) == BLOB_BYTES


async def test_frames_of_a_jobs_own_take_the_place_of_what_it_reserved(
    store: FrameStore, queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    await create(queue, "j", "a", num_bytes=2 * BLOB_BYTES)
    await put(store, "b", "j")
    assert await stored(store) == "b" and await reserved(redis, keys) == BLOB_BYTES
    await cancel(queue, "j")
    assert await reserved(redis, keys) == BLOB_BYTES
    assert await redis.hkeys(keys.frame_sizes) == [b"b"]


async def test_reservation_of_a_job_that_is_gone_makes_room(
    store: FrameStore, queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    """Its API died, and so did every process that might have ended it."""
    for letter in "ab":
        await create(queue, f"j{letter}", letter)
    await redis.zrem(keys.live, "ja")
    await create(queue, "jc", "c")
    assert await redis.hkeys(keys.frame_sizes) == [b"b", b"c"]


async def test_adopted_job_reserves_where_an_earlier_release_did_not(
    store: FrameStore, queue: JobQueue, redis: Redis, keys: RedisKeys
) -> None:
    for job_id in ("j1", "j2", "j3"):
        await reading_job(queue, job_id)

    async def pin_or_reserve(digest: str, job_id: str) -> FramesHeader | None:
        return await store.pin_or_reserve(digest, job_id, VIDEO, num_bytes=BLOB_BYTES)

    assert await pin_or_reserve("a", "j1") is None
    assert await pin_or_reserve("a", "j1") is None
    assert await pin_or_reserve("b", "j2") is None
    assert await reserved(redis, keys) == 2 * BLOB_BYTES
    with pytest.raises(FrameStoreFullError):
        await pin_or_reserve("c", "j3")
    assert await pin_or_reserve("c", "gone") is None
    assert await reserved(redis, keys) == 2 * BLOB_BYTES
    await put(store, "a", "j1")
    assert await pin_or_reserve("a", "j3") is not None


def test_blob_is_never_larger_than_what_is_reserved_for_it() -> None:
    for num_frames, size in ((1, 8), (128, 8), (1024, 16)):
        spec = FrameSpec(num_frames, size)
        frames = VideoFrames(
            pixels=np.zeros(spec.shape(0, 0), np.uint8),
            indices=tuple(range(10**6, 10**6 + num_frames)),
            timestamps_s=tuple(number / 7 + 10_000 for number in range(num_frames)),
            reader="decord",
            warnings=("the frames end at 12.34 s, the file at 56.78 s",) * 10,
        )
        assert len(encode_frames(frames)) <= max_blob_bytes(spec, 0, 0)
