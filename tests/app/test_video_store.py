"""Uploads on disk: content addresses, the byte budget, and what nobody may remove."""

import asyncio
import errno
import fcntl
import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from app.errors import (
    StoreUnavailableError,
    TooManyUploadsError,
    UploadTooLargeError,
    VideoNotFoundError,
    VideoStoreFullError,
)
from app.keys.owners import ANONYMOUS
from app.process_table import ProcessRow, ProcessTable
from app.video_store import (
    NO_STORAGE_QUOTA,
    StorageQuota,
    StoredVideo,
    VideoLease,
    VideoStore,
    disk,
    incoming,
    references,
)
from dycoke_core.video import VideoProbe

OWNER, OTHER = "owner", "other"
PROBE = VideoProbe("mp4", "h264", 64, 48, 10.0, 250, 25.0)
KIB = 1024
ROW = ProcessTable.create(1).take_row(0)


async def open_store(
    directory: Path,
    max_bytes: int = 10 * KIB,
    row: ProcessRow = ROW,
    *,
    max_videos: int = 100,
    max_incoming_bytes: int = 20 * KIB,
) -> VideoStore:
    store = VideoStore(
        directory,
        max_bytes=max_bytes,
        max_videos=max_videos,
        max_upload_bytes=8 * KIB,
        max_incoming_bytes=max_incoming_bytes,
        row=row,
    )
    await store.open()
    return store


async def put(
    store: VideoStore, content: bytes, owner: str = OWNER, quota: StorageQuota = NO_STORAGE_QUOTA
) -> VideoLease:
    async with store.receive() as upload:
        await upload.write(content)
        video_id = await upload.finish()
        return await store.commit(upload, video_id, PROBE, owner, quota=quota)


async def put_and_release(
    store: VideoStore,
    content: bytes,
    used_at_s: float,
    owner: str = OWNER,
    quota: StorageQuota = NO_STORAGE_QUOTA,
) -> str:
    lease = await put(store, content, owner, quota)
    lease.release()
    os.utime(lease.path, (used_at_s, used_at_s))
    return lease.video.video_id


def files(directory: Path) -> set[str]:
    """All but the lock, which stays."""
    return {path.name for path in directory.rglob("*") if path.is_file()} - {".lock"}


def incoming_bytes(row: ProcessRow = ROW) -> int:
    return row.table.incoming_bytes()


async def test_video_is_named_by_its_content(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    lease = await put(store, b"abc")
    assert lease.video.video_id == f"vid_{hashlib.sha256(b'abc').hexdigest()}"
    assert lease.path.read_bytes() == b"abc"
    found = await store.find(lease.video.video_id, OWNER)
    assert found == lease.video
    assert isinstance(found, StoredVideo) and found.probe == PROBE
    lease.release()


async def test_same_content_is_stored_once(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    leases = await asyncio.gather(*(put(store, b"abc") for _ in range(5)))
    assert len({lease.video.created_at_s for lease in leases}) == 1
    assert len(files(tmp_path)) == 2
    assert store._room.used_bytes == 3
    for lease in leases:
        lease.release()


async def test_upload_over_the_cap_is_refused_when_it_passes_it(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    with pytest.raises(UploadTooLargeError):
        async with store.receive() as upload:
            await upload.write(bytes(8 * KIB))
            await upload.write(b"x")
    assert files(tmp_path) == set()
    assert store._room.used_bytes == 0


async def test_abandoned_upload_leaves_nothing(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    with pytest.raises(RuntimeError):
        async with store.receive() as upload:
            await upload.write(bytes(KIB))
            await upload.finish()
            raise RuntimeError
    assert files(tmp_path) == set()
    assert store._room.used_bytes == 0


async def test_cancelled_upload_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incoming, "FLUSH_BYTES", 1)
    store = await open_store(tmp_path)

    async def upload_for_ever() -> None:
        async with store.receive() as upload:
            while True:
                await upload.write(b"x")

    for delay_s in (0.0, 0.001, 0.003, 0.01):
        task = asyncio.create_task(upload_for_ever())
        await asyncio.sleep(delay_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert files(tmp_path) == set()
        assert store._room.used_bytes == 0


async def test_least_recently_used_videos_make_room(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    now = time.time()
    old = await put_and_release(store, b"a" * 4 * KIB, now - 300)
    older = await put_and_release(store, b"b" * 4 * KIB, now - 400)
    (await store.lease(older, OWNER)).release()  # used just now
    newest = await put_and_release(store, b"c" * 4 * KIB, now)
    with pytest.raises(VideoNotFoundError):
        await store.find(old, OWNER)
    assert {(await store.find(v, OWNER)).num_bytes for v in (older, newest)} == {4 * KIB}
    assert store._room.used_bytes == 8 * KIB


async def test_video_in_use_is_not_evicted(tmp_path: Path) -> None:
    store, other_process = await open_store(tmp_path), await open_store(tmp_path)
    lease = await put(store, bytes(7 * KIB))
    for each in (store, other_process):
        await each.tidy()
        with pytest.raises(VideoStoreFullError):
            await put(each, b"x" * 4 * KIB)
    assert lease.path.exists()
    assert len(files(tmp_path)) == 2
    lease.release()
    (await put(other_process, b"x" * 4 * KIB)).release()
    with pytest.raises(VideoNotFoundError):
        await store.lease(lease.video.video_id, OWNER)


async def test_dropped_lease_holds_nothing(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    video_id = (await put(store, b"abc")).video.video_id
    await store.delete(video_id, OWNER)
    assert files(tmp_path) == set()


async def test_cancelled_lease_holds_nothing(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    video_id = await put_and_release(store, b"abc", time.time())
    for _ in range(20):
        task = asyncio.create_task(store.lease(video_id, OWNER))
        await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            (await task).release()
    await store.delete(video_id, OWNER)


async def test_full_disk_is_said_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await open_store(tmp_path)

    def full(fd: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with store.receive() as upload:
        await upload.write(b"x")
        monkeypatch.setattr(incoming.os, "write", full)
        with pytest.raises(VideoStoreFullError):
            await upload.finish()
    monkeypatch.undo()
    assert store._room.used_bytes == 0


async def test_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    long_ago = time.time() - 3600

    def leave(path: Path, at_s: float) -> None:
        path.write_bytes(b"x")
        os.utime(path, (at_s, at_s))

    leave(incoming / "dead", long_ago)
    leave(incoming / "young", time.time())
    leave(tmp_path / f"vid_{'0' * 64}.json", long_ago)
    store = await open_store(tmp_path)
    assert files(tmp_path) == {"young"}
    async with store.receive() as upload:
        await upload.write(b"y")
        await upload.finish()
        os.utime(upload.path, (long_ago, long_ago))
        await (await open_store(tmp_path)).tidy()  # slow, but alive
        assert upload.path.exists()


async def test_videos_survive_a_restart_and_count(tmp_path: Path) -> None:
    video_id = await put_and_release(await open_store(tmp_path), bytes(6 * KIB), 1.0)
    store = await open_store(tmp_path)
    assert store._room.used_bytes == 6 * KIB
    assert (await store.find(video_id, OWNER)).probe == PROBE


async def test_smaller_budget_evicts_at_start(tmp_path: Path) -> None:
    await put_and_release(await open_store(tmp_path), bytes(6 * KIB), 1.0)
    store = await open_store(tmp_path, max_bytes=KIB)
    assert store._room.used_bytes == 0
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    "video_id",
    ["", "..", "../x", "vid_", "vid_" + "A" * 64, "vid_" + "0" * 63, "vid_" + "0" * 64 + "\n"],
)
async def test_malformed_id_is_not_found(tmp_path: Path, video_id: str) -> None:
    store = await open_store(tmp_path)
    calls: list[Callable[[str, str], object]] = [store.find, store.lease, store.delete]
    for call in calls:
        with pytest.raises(VideoNotFoundError):
            await call(video_id, OWNER)  # type: ignore[misc]


async def test_removal_that_comes_late_spares_a_new_upload_of_the_same_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has opened the old file when the old one is removed and the content uploaded anew."""
    store = await open_store(tmp_path)
    video_id = await put_and_release(store, b"abc", used_at_s=1.0)
    flock = fcntl.flock

    def stall(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        store._remove(video_id)
        store._path(video_id).write_bytes(b"abc")
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", stall)
    with pytest.raises(VideoNotFoundError):
        store._remove(video_id)
    assert store._path(video_id).read_bytes() == b"abc"


# --- owners ---


async def test_owners_see_their_own_uploads_and_nothing_else(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    video_id = await put_and_release(store, b"abc", used_at_s=1.0)
    for call in (store.find, store.lease, store.delete):
        with pytest.raises(VideoNotFoundError):
            await call(video_id, OTHER)
    assert os.stat(tmp_path / video_id).st_mtime == 1.0, "nor do they keep it from eviction"
    first = await store.find(video_id, OWNER)
    (await put(store, b"abc", OTHER)).release()
    second = await store.find(video_id, OTHER)
    assert second.created_at_s > first.created_at_s
    assert await store.find(video_id, OWNER) == first
    assert store._room.used_bytes == 3, "the bytes are there once"


async def test_video_goes_with_its_last_reference(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    video_id = await put_and_release(store, b"abc", used_at_s=1.0)
    for owner in (OTHER, ANONYMOUS):
        (await put(store, b"abc", owner)).release()
    for owner in (OWNER, ANONYMOUS):
        await store.delete(video_id, owner)
        with pytest.raises(VideoNotFoundError):
            await store.find(video_id, owner)
        assert (await store.find(video_id, OTHER)).num_bytes == 3
    await store.delete(video_id, OTHER)
    assert files(tmp_path) == set()
    assert store._room.used_bytes == 0


async def test_deleted_video_is_gone_at_once_and_its_bytes_with_the_last_job(
    tmp_path: Path,
) -> None:
    store, other_process = await open_store(tmp_path), await open_store(tmp_path)
    lease = await put(store, b"abc")
    await other_process.delete(lease.video.video_id, OWNER)
    for call in (store.find, store.lease, other_process.delete):
        with pytest.raises(VideoNotFoundError):
            await call(lease.video.video_id, OWNER)
    await store.tidy()
    assert lease.path.read_bytes() == b"abc"
    lease.release()
    await store.tidy()
    assert files(tmp_path) == set()


async def test_eviction_takes_every_reference(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    video_id = await put_and_release(store, bytes(6 * KIB), used_at_s=1.0)
    (await put(store, bytes(6 * KIB), OTHER)).release()
    (await put(store, b"x" * 6 * KIB)).release()
    for owner in (OWNER, OTHER):
        with pytest.raises(VideoNotFoundError):
            await store.find(video_id, owner)


async def test_video_of_a_release_without_keys_is_everybodys_who_has_none(tmp_path: Path) -> None:
    """It left the record beside the video."""
    store = await open_store(tmp_path)
    video_id = await put_and_release(store, b"abc", used_at_s=1.0, owner=ANONYMOUS)
    assert files(tmp_path) == {video_id, f"{video_id}.json"}
    assert (await (await open_store(tmp_path)).find(video_id, ANONYMOUS)).probe == PROBE


async def test_uploads_and_deletions_of_the_same_content_leave_it_whole(tmp_path: Path) -> None:
    """Whoever has committed has the video, whatever others delete meanwhile."""
    stores = [await open_store(tmp_path), await open_store(tmp_path)]

    async def come_and_go(store: VideoStore, owner: str) -> None:
        for _ in range(25):
            lease = await put(store, b"abc", owner)
            assert lease.path.read_bytes() == b"abc"
            assert os.fstat(lease._fd or 0).st_nlink == 1
            lease.release()
            assert (await store.find(lease.video.video_id, owner)).num_bytes == 3
            await store.delete(lease.video.video_id, owner)

    await asyncio.gather(*(come_and_go(s, f"owner{n}") for n, s in enumerate(stores * 2)))
    for store in stores:
        await store.tidy()
    assert files(tmp_path) == set()


async def test_budget_holds_for_processes_that_share_the_directory(
    tmp_path: Path, process_table: ProcessTable
) -> None:
    here, there = [
        await open_store(tmp_path, max_bytes=10 * KIB, row=process_table.take_row(slot))
        for slot in range(2)
    ]
    held = await put(here, b"a" * (6 * KIB))
    with pytest.raises(VideoStoreFullError):
        await put(there, b"b" * (5 * KIB))
    assert here._room.used_bytes == there._room.used_bytes == 6 * KIB
    held.release()
    other = await put(there, b"b" * (5 * KIB))
    assert here._room.used_bytes == there._room.used_bytes == 5 * KIB
    process_table.note_death(1)
    assert here._room.used_bytes == 5 * KIB, "what a dead process has stored is there"
    await here.tidy()
    assert here._room.used_bytes == 5 * KIB
    other.release()


async def test_bytes_come_in_while_those_before_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incoming, "FLUSH_BYTES", 4)
    may_write = threading.Event()
    write = incoming.Upload._write

    def wait_and_write(upload: incoming.Upload, data: bytearray, is_last: bool) -> None:
        assert may_write.wait(20)
        write(upload, data, is_last)

    monkeypatch.setattr(incoming.Upload, "_write", wait_and_write)
    store = await open_store(tmp_path)
    async with store.receive() as upload:
        await upload.write(b"abcd")  # is being written
        await upload.write(b"efg")
        third = asyncio.create_task(upload.write(b"h"))
        await asyncio.sleep(0.02)
        assert not third.done(), "no more than two buffers are held"
        may_write.set()
        await third
        assert await upload.finish() == f"vid_{hashlib.sha256(b'abcdefgh').hexdigest()}"
        assert upload.path.read_bytes() == b"abcdefgh"


async def test_upload_given_up_in_mid_write_closes_its_file_after_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incoming, "FLUSH_BYTES", 4)
    is_writing, may_write, written = threading.Event(), threading.Event(), []
    write = incoming.Upload._write

    def wait_and_write(upload: incoming.Upload, data: bytearray, is_last: bool) -> None:
        is_writing.set()
        assert may_write.wait(20)
        write(upload, data, is_last)
        written.append(bytes(data))

    monkeypatch.setattr(incoming.Upload, "_write", wait_and_write)
    store = await open_store(tmp_path)

    async def receive() -> None:
        async with store.receive() as upload:
            await upload.write(b"abcd")
            await asyncio.sleep(60)

    task = asyncio.create_task(receive())
    await asyncio.to_thread(is_writing.wait, 20)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.02)
    assert not task.done()
    may_write.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert written == [b"abcd"]
    assert files(tmp_path) == set()
    assert store._room.used_bytes == 0


# --- what an upload may displace, and when ---


async def test_upload_displaces_nothing_until_it_is_committed(tmp_path: Path) -> None:
    """It may turn out to be no video."""
    store = await open_store(tmp_path)
    kept = [await put_and_release(store, letter * 5 * KIB, 1.0) for letter in (b"a", b"b")]
    async with store.receive() as upload:
        await upload.write(bytes(8 * KIB))
        video_id = await upload.finish()
        assert incoming_bytes() == 8 * KIB
        await store.tidy()
        for kept_id in kept:
            assert await store.find(kept_id, OWNER)
        (await store.commit(upload, video_id, PROBE, OWNER)).release()
        assert incoming_bytes() == 0
    assert files(tmp_path) == {video_id, f"{video_id}.json"}
    assert store._room.used_bytes == 8 * KIB and store._room.num_videos == 1


async def test_uploads_under_way_have_a_budget_of_their_own(
    tmp_path: Path, process_table: ProcessTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incoming, "FLUSH_BYTES", KIB)
    rows = [process_table.take_row(slot) for slot in range(2)]
    here, there = [await open_store(tmp_path, row=row, max_incoming_bytes=10 * KIB) for row in rows]
    async with here.receive() as first, there.receive() as second:
        for upload in (first, second):
            await upload.write(bytes(5 * KIB))
            await upload.settle()
        assert process_table.incoming_bytes() == 10 * KIB
        await second.write(bytes(KIB))
        with pytest.raises(TooManyUploadsError):
            await second.finish()
        (await here.commit(first, await first.finish(), PROBE, OWNER)).release()
        assert process_table.incoming_bytes() == 5 * KIB, "what is stored comes in no longer"
    assert process_table.incoming_bytes() == 0
    assert here._room.used_bytes == 5 * KIB


async def test_store_holds_so_many_videos(tmp_path: Path) -> None:
    store = await open_store(tmp_path, max_videos=2)
    now = time.time()
    _, second, third = [
        await put_and_release(store, letter, now - 100 + at)
        for at, letter in enumerate([b"a", b"b", b"c"])
    ]
    assert files(tmp_path) == {second, third, f"{second}.json", f"{third}.json"}
    (await put(store, b"c", OTHER)).release()
    assert store._room.num_videos == 2, "the same bytes are one video"
    reopened = await open_store(tmp_path, max_videos=1)
    assert reopened._room.num_videos == 1
    assert files(tmp_path) == {third, f"{third}.json"}, "the one that was used last"


@pytest.mark.parametrize(
    "quota", [StorageQuota(max_bytes=10), StorageQuota(max_videos=2)], ids=["bytes", "videos"]
)
async def test_owner_over_its_quota_loses_its_own_videos_alone(
    tmp_path: Path, quota: StorageQuota
) -> None:
    store = await open_store(tmp_path)
    others = await put_and_release(store, b"aaaa", 1.0, OTHER)
    shared = await put_and_release(store, b"aaaa", 1.0, OWNER, quota)
    second = await put_and_release(store, b"bbbb", 2.0, OWNER, quota)
    third = await put_and_release(store, b"cccc", 3.0, OWNER, quota)
    owned = {video.video_id for video in await store.owned_by(OWNER)}
    assert owned == {second, third}
    assert shared == others and (await store.find(others, OTHER)).num_bytes == 4
    (await put(store, b"bbbb", OWNER, quota)).release()
    assert {video.video_id for video in await store.owned_by(OWNER)} == owned


async def test_video_larger_than_its_owners_quota_is_refused(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    kept = await put_and_release(store, b"abc", 1.0)
    with pytest.raises(UploadTooLargeError):
        await put(store, bytes(100), quota=StorageQuota(max_bytes=99))
    assert files(tmp_path) == {kept, f"{kept}.json"}
    assert store._room.used_bytes == 3 and incoming_bytes() == 0


async def test_disk_that_fills_with_the_reference_is_said_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_store(tmp_path)

    def full(fd: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    async with store.receive() as upload:
        await upload.write(b"x")
        video_id = await upload.finish()
        monkeypatch.setattr("app.video_store.references.os.fsync", full)
        with pytest.raises(VideoStoreFullError):
            await store.commit(upload, video_id, PROBE, OWNER)
        monkeypatch.undo()
    assert files(tmp_path) == set()
    assert store._room.used_bytes == 0 and store._room.num_videos == 0


# --- several processes on one directory ---


async def test_commit_waits_for_one_in_another_process_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "LOCK_TIMEOUT_S", 0.05)
    store = await open_store(tmp_path)
    with (tmp_path / ".lock").open("w") as other_process:
        fcntl.flock(other_process, fcntl.LOCK_EX)
        with pytest.raises(StoreUnavailableError):
            await put(store, b"abc")
        monkeypatch.undo()
        commit = asyncio.create_task(put(store, b"abc"))
        await asyncio.sleep(0.05)
        assert not commit.done()
        fcntl.flock(other_process, fcntl.LOCK_UN)
        (await commit).release()
    assert len(files(tmp_path)) == 2 and store._room.num_videos == 1


async def test_tidying_and_expiry_look_into_each_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_store(tmp_path)
    for letter in b"abcdef":
        for number in range(4):
            (await put(store, bytes([letter]), f"owner{number}")).release()
    scans: Counter[Path] = Counter()
    looks: Counter[Path] = Counter()
    scan, exists = references.scan, Path.exists

    def counted(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
        scans[folder] += 1
        return scan(folder)

    def looked(path: Path, **options: bool) -> bool:
        looks[path] += 1
        return exists(path, **options)

    monkeypatch.setattr(references, "scan", counted)
    monkeypatch.setattr(Path, "exists", looked)
    assert await store.expired() == []
    assert set(scans.values()) == {1} and len(scans) == 5
    monkeypatch.setattr(json, "loads", None)  # nothing has changed: nothing is read again
    assert await store.expired() == []
    scans.clear()
    await store.tidy()
    assert set(scans.values()) == {1} and len(scans) == 5
    assert not looks, "no video is looked for in every owner's folder"
