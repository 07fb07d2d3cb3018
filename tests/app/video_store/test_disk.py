"""The lock of a directory, full disks, and what is removed of a folder that others use too."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from app.errors import StoreUnavailableError, VideoStoreFullError
from app.video_store import disk
from app.video_store.disk import (
    UNLOCKED_GRACE_S,
    DirectoryLock,
    folders,
    full_disk_told,
    is_old,
    remove_unlocked,
    scan,
)


@pytest.fixture
def lock(tmp_path: Path) -> DirectoryLock:
    return DirectoryLock(tmp_path / ".lock")


def hold_elsewhere(path: Path) -> int:
    """Locks it as another process would; closing the descriptor gives it back."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def test_threads_hold_it_one_after_another(lock: DirectoryLock) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            with lock.held():
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 80


def test_it_is_given_back_by_a_block_that_fails(lock: DirectoryLock) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), lock.held():
            raise KeyError


def test_what_is_held_elsewhere_for_too_long_is_told(
    lock: DirectoryLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "LOCK_TIMEOUT_S", 0.02)
    fd = hold_elsewhere(tmp_path / ".lock")
    with pytest.raises(StoreUnavailableError), lock.held():
        pass
    os.close(fd)
    with lock.held():
        pass


def test_it_is_held_when_another_process_has_given_it_back(
    lock: DirectoryLock, tmp_path: Path
) -> None:
    fd = hold_elsewhere(tmp_path / ".lock")
    timer = threading.Timer(0.03, os.close, [fd])
    timer.start()
    with lock.held():
        pass
    timer.join()


def test_it_goes_with_its_process(lock: DirectoryLock, tmp_path: Path) -> None:
    holder = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDWR|os.O_CREAT), 2)"
    subprocess.run([sys.executable, "-c", holder, tmp_path / ".lock"], check=True, timeout=30)
    with lock.held():
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_as_one(number: int) -> None:
    with pytest.raises(VideoStoreFullError), full_disk_told():
        raise OSError(number, "full")


def test_any_other_failure_stays_what_it_is() -> None:
    with pytest.raises(PermissionError), full_disk_told():
        raise PermissionError(errno.EACCES, "no")


def test_files_and_folders_are_listed_apart_and_links_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "link-to-folder").symlink_to(tmp_path / "folder")
    assert [(path.name, status.st_size) for path, status in scan(tmp_path)] == [("file", 5)]
    assert folders(tmp_path) == [tmp_path / "folder"]


def test_a_file_that_vanishes_while_it_is_listed_is_left_out(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).touch()
    listing = scan(tmp_path)
    first, _ = next(listing)
    for name in "abc":
        (tmp_path / name).unlink()
    assert [path for path, _ in listing if path == first] == []


def test_what_is_young_may_not_be_locked_yet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    assert not is_old(path.stat())
    then = time.time() - UNLOCKED_GRACE_S - 1
    os.utime(path, (then, then))
    assert is_old(path.stat())


def test_only_what_nobody_has_locked_is_removed(tmp_path: Path) -> None:
    used, unused = tmp_path / "used", tmp_path / "unused"
    unused.touch()
    fd = hold_elsewhere(used)
    for path in (used, unused, tmp_path / "none"):
        remove_unlocked(path)
    assert used.exists() and not unused.exists()
    os.close(fd)
    remove_unlocked(used)
    assert not used.exists()
