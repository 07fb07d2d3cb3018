"""Uploads under way: their budget, and what remains of those that are abandoned."""

import asyncio
import errno
import hashlib
import threading
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from app.errors import (
    TooManyUploadsError,
    UploadTooLargeError,
    VideoStoreFullError,
)
from app.process_table import ProcessTable
from app.video_store import VideoStore, incoming
from tests.app.video_store.videos import (
    KIB,
    OTHER,
    OWNER,
    PROBE,
    files,
    incoming_bytes,
    open_store,
    put_and_release,
)


async def test_upload_over_the_cap_is_refused_when_it_passes_it(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    with pytest.raises(UploadTooLargeError):
        async with store.receive() as upload:
            await upload.write(bytes(8 * KIB))
            await upload.write(b"x")
    assert files(tmp_path) == set()
    assert store.room.used_bytes == 0


async def test_abandoned_upload_leaves_nothing(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    with pytest.raises(RuntimeError):
        async with store.receive() as upload:
            await upload.write(bytes(KIB))
            await upload.finish()
            raise RuntimeError
    assert files(tmp_path) == set()
    assert store.room.used_bytes == 0


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
        assert store.room.used_bytes == 0


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
        assert not third.done(), "at most two buffers are held"
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
    assert store.room.used_bytes == 0


# --- what an upload may evict, and when ---


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
    assert store.room.used_bytes == 8 * KIB and store.room.num_videos == 1


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
    assert here.room.used_bytes == 5 * KIB


async def test_one_owner_leaves_half_of_the_room_to_others_in_all_processes(
    tmp_path: Path, process_table: ProcessTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploads have at most 8 KiB, and so four of them room."""
    monkeypatch.setattr(incoming, "FLUSH_BYTES", KIB)
    rows = [process_table.take_row(slot) for slot in range(2)]
    here, there = [await open_store(tmp_path, row=row, max_incoming_bytes=32 * KIB) for row in rows]
    async with AsyncExitStack() as stack:

        async def send(store: VideoStore, owner: str) -> None:
            upload = await stack.enter_async_context(store.receive(owner))
            await upload.write(bytes(8 * KIB))
            await upload.finish()

        await send(here, OWNER)
        await send(there, OWNER)
        for store in (here, there):
            with pytest.raises(TooManyUploadsError):
                await send(store, OWNER)
        await send(here, OTHER)
        await send(there, "a third")
        with pytest.raises(TooManyUploadsError):
            await send(here, "a fourth")
    assert process_table.incoming_bytes() == process_table.incoming_bytes(OWNER) == 0


async def test_room_for_one_upload_is_anybodys(tmp_path: Path) -> None:
    store = await open_store(tmp_path, max_incoming_bytes=8 * KIB)
    async with store.receive(OWNER) as upload:
        await upload.write(bytes(8 * KIB))
        (await store.commit(upload, await upload.finish(), PROBE, OWNER)).release()


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
    assert store.room.used_bytes == 0


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
    assert store.room.used_bytes == 0 and store.room.num_videos == 0
