"""A small store, and videos in it."""

import os
from pathlib import Path

from app.keys.entries import ANONYMOUS
from app.process_table import ProcessRow, ProcessTable
from app.video_store import (
    NO_STORAGE_QUOTA,
    StorageQuota,
    VideoLease,
    VideoStore,
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
    for path in (lease.path, reference_path(lease, owner)):
        os.utime(path, (used_at_s, used_at_s))
    return lease.video.video_id


def reference_path(lease: VideoLease, owner: str = OWNER) -> Path:
    """Where the store keeps what the owner may know of the video."""
    folder = lease.path.parent
    folder = folder if owner == ANONYMOUS else folder / "owners" / owner
    return folder / f"{lease.path.name}.json"


def files(directory: Path) -> set[str]:
    """All but the lock, which stays."""
    return {path.name for path in directory.rglob("*") if path.is_file()} - {".lock"}


def incoming_bytes(row: ProcessRow = ROW) -> int:
    return row.table.incoming_bytes()
