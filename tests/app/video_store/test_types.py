"""How long a video stays, how much an owner may have, and the lease that keeps a file."""

import gc
import os
import time
from pathlib import Path

import pytest

from app.video_store.types import (
    FOREVER,
    NO_STORAGE_QUOTA,
    VIDEO_ID,
    Retention,
    StorageQuota,
    StoredVideo,
    VideoLease,
)
from tests.app.video_store.videos import PROBE


def test_a_video_is_over_at_its_time() -> None:
    now = time.time()
    assert Retention(now - 1).is_over and Retention(now).is_over
    assert not Retention(now + 60).is_over and not FOREVER.is_over


@pytest.mark.parametrize(
    ("first", "second", "ends_at_s"),
    [(1.0, 2.0, 2.0), (2.0, 1.0, 2.0), (None, 1.0, None), (1.0, None, None), (None, None, None)],
)
def test_of_two_uploads_the_later_end_counts(
    first: float | None, second: float | None, ends_at_s: float | None
) -> None:
    joined = Retention(first, "user_data").joined(Retention(second, "vision"))
    assert joined == Retention(ends_at_s, "vision")


def test_a_quota_bounds_bytes_and_videos() -> None:
    quota = StorageQuota(max_bytes=10, max_videos=2)
    assert quota.has_room(10, 2)
    assert not quota.has_room(11, 1) and not quota.has_room(1, 3)
    assert StorageQuota(max_bytes=10).has_room(10, 10**9)
    assert NO_STORAGE_QUOTA.has_room(10**18, 10**9)


@pytest.mark.parametrize(
    "text", ["", "vid_", "vid_" + "0" * 63, "vid_" + "G" * 64, "../vid_" + "0" * 64]
)
def test_an_id_can_be_no_path(text: str) -> None:
    assert not VIDEO_ID.fullmatch(text)
    assert VIDEO_ID.fullmatch("vid_" + "0a" * 32)


def leased(path: Path) -> tuple[VideoLease, int]:
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    video = StoredVideo("vid_1", 0, 0.0, PROBE, FOREVER)
    return VideoLease(video, path, fd), fd


def is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


def test_a_lease_is_given_back_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease, fd = leased(tmp_path / "video")
    closed: list[int] = []
    with monkeypatch.context() as patches:
        patches.setattr(os, "close", closed.append)
        lease.release()
        lease.release()  # its number may be another file's by now
    os.close(fd)
    assert closed == [fd]


def test_a_lease_that_is_lost_gives_its_file_back(tmp_path: Path) -> None:
    lease, fd = leased(tmp_path / "video")
    del lease
    gc.collect()
    assert not is_open(fd)
