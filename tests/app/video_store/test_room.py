"""The store's budget: which videos go for others."""

import time
from pathlib import Path

import pytest

from app.errors import (
    VideoNotFoundError,
    VideoStoreFullError,
)
from app.process_table import ProcessTable
from tests.app.video_store.videos import (
    KIB,
    OTHER,
    OWNER,
    files,
    open_store,
    put,
    put_and_release,
)


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
    assert store.room.used_bytes == 8 * KIB


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


async def test_smaller_budget_evicts_at_start(tmp_path: Path) -> None:
    await put_and_release(await open_store(tmp_path), bytes(6 * KIB), 1.0)
    store = await open_store(tmp_path, max_bytes=KIB)
    assert store.room.used_bytes == 0
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
    assert here.room.used_bytes == there.room.used_bytes == 6 * KIB
    held.release()
    other = await put(there, b"b" * (5 * KIB))
    assert here.room.used_bytes == there.room.used_bytes == 5 * KIB
    process_table.note_death(1)
    assert here.room.used_bytes == 5 * KIB, "what a dead process has stored is there"
    await here.tidy()
    assert here.room.used_bytes == 5 * KIB
    other.release()


async def test_store_holds_so_many_videos(tmp_path: Path) -> None:
    store = await open_store(tmp_path, max_videos=2)
    now = time.time()
    _, second, third = [
        await put_and_release(store, letter, now - 100 + at)
        for at, letter in enumerate([b"a", b"b", b"c"])
    ]
    assert files(tmp_path) == {second, third, f"{second}.json", f"{third}.json"}
    (await put(store, b"c", OTHER)).release()
    assert store.room.num_videos == 2, "the same bytes are one video"
    reopened = await open_store(tmp_path, max_videos=1)
    assert reopened.room.num_videos == 1
    assert files(tmp_path) == {third, f"{third}.json"}, "the one that was used last"
