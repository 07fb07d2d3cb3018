"""Uploads on disk: content addresses, leases, restarts, and what may not be removed."""

import asyncio
import fcntl
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from app.errors import (
    StoreUnavailableError,
    VideoNotFoundError,
)
from app.video_store import (
    StoredVideo,
    VideoStore,
    disk,
    references,
)
from tests.app.video_store.videos import (
    KIB,
    OWNER,
    PROBE,
    files,
    open_store,
    put,
    put_and_release,
)


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
    assert store.room.used_bytes == 3
    for lease in leases:
        lease.release()


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
    assert store.room.used_bytes == 6 * KIB
    assert (await store.find(video_id, OWNER)).probe == PROBE


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
    """It opens the old file just before that one is removed and the content uploaded again."""
    store = await open_store(tmp_path)
    video_id = await put_and_release(store, b"abc", used_at_s=1.0)
    flock = fcntl.flock

    def stall(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        store.remove_unused(video_id)
        store.path_of(video_id).write_bytes(b"abc")
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", stall)
    with pytest.raises(VideoNotFoundError):
        store.remove_unused(video_id)
    assert store.path_of(video_id).read_bytes() == b"abc"


async def test_uploads_and_deletions_of_the_same_content_leave_it_whole(tmp_path: Path) -> None:
    """An owner that has committed has the video, whatever others delete meanwhile."""
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
    assert len(files(tmp_path)) == 2 and store.room.num_videos == 1


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
