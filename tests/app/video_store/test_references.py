"""Whose videos they are: references of owners, and their quotas."""

import os
from pathlib import Path

import pytest

from app.errors import (
    UploadTooLargeError,
    VideoNotFoundError,
)
from app.keys.entries import ANONYMOUS
from app.video_store import (
    StorageQuota,
    VideoStore,
)
from tests.app.video_store.videos import (
    KIB,
    OTHER,
    OWNER,
    PROBE,
    files,
    incoming_bytes,
    open_store,
    put,
    put_and_release,
)


async def ids_of(store: VideoStore) -> set[str]:
    videos, _ = await store.page(OWNER, limit=100)
    return {video.video_id for video in videos}


# --- owners ---


async def test_listing_reads_what_has_changed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_store(tmp_path)
    ids = [await put_and_release(store, bytes([n]) * 4, 1.0 + n) for n in range(5)]
    read: list[str] = []
    read_bytes = Path.read_bytes

    def note(path: Path) -> bytes:
        read.append(path.stem)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", note)
    for _ in range(3):
        assert await store.page(OWNER, limit=0) == ([], True)
    assert sorted(read) == sorted(ids), "each once"
    read.clear()
    first, has_more = await store.page(OWNER, limit=2, newest_first=False)
    assert [video.video_id for video in first] == ids[:2] and has_more
    rest, has_more = await store.page(OWNER, limit=3, newest_first=False, after=ids[1])
    assert [video.video_id for video in rest] == ids[2:] and not has_more
    assert read == ids
    with pytest.raises(VideoNotFoundError):
        await store.page(OTHER, limit=1, after=ids[0])


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
    assert store.room.used_bytes == 3, "the bytes are there once"


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
    assert store.room.used_bytes == 0


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
    owned = await ids_of(store)
    assert owned == {second, third}
    assert shared == others and (await store.find(others, OTHER)).num_bytes == 4
    (await put(store, b"bbbb", OWNER, quota)).release()
    assert await ids_of(store) == owned


async def test_quota_goes_by_the_owners_own_use(tmp_path: Path) -> None:
    """Otherwise evictions would tell an owner that someone else uses the same bytes."""
    store = await open_store(tmp_path)
    quota = StorageQuota(max_videos=2)
    oldest = await put_and_release(store, b"aaaa", 1.0, OWNER, quota)
    newer = await put_and_release(store, b"bbbb", 2.0, OWNER, quota)
    (await put(store, b"aaaa", OTHER)).release()
    (await store.lease(oldest, OTHER)).release()
    await put_and_release(store, b"cccc", 3.0, OWNER, quota)
    with pytest.raises(VideoNotFoundError):
        await store.find(oldest, OWNER)
    (await store.lease(newer, OWNER)).release()  # later than the third one
    await put_and_release(store, b"dddd", 4.0, OWNER, quota)
    assert (await store.find(newer, OWNER)).num_bytes == 4


async def test_video_larger_than_its_owners_quota_is_refused(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    kept = await put_and_release(store, b"abc", 1.0)
    with pytest.raises(UploadTooLargeError):
        await put(store, bytes(100), quota=StorageQuota(max_bytes=99))
    assert files(tmp_path) == {kept, f"{kept}.json"}
    assert store.room.used_bytes == 3 and incoming_bytes() == 0
