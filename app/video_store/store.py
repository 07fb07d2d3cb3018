"""The store itself. Everything that blocks runs in threads."""

import asyncio
import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from app.errors import VideoNotFoundError, VideoStoreFullError
from app.keys.owners import ANONYMOUS, OWNER_ID
from app.process_table import ProcessRow
from app.threads import in_thread
from app.video_store.incoming import Upload
from app.video_store.types import FOREVER, VIDEO_ID, Retention, StoredVideo, VideoLease
from dycoke_core.video import VideoProbe

UNLOCKED_GRACE_S = 60.0  # a file may be this young and not locked yet


class VideoStore:
    """Args:
    row: of this process, among those that may use the directory at the same time.
    """

    def __init__(
        self, directory: Path, *, max_bytes: int, max_upload_bytes: int, row: ProcessRow
    ) -> None:
        self._max_upload_bytes = max_upload_bytes
        self._directory = directory
        self._incoming = directory / "incoming"
        self._owners = directory / "owners"
        self._max_bytes = max_bytes
        self._row = row
        self._scanned_bytes = 0  # beyond what the processes' table counts
        self._room = threading.Lock()  # guards both
        self._committing = threading.Lock()

    async def open(self) -> None:
        await asyncio.to_thread(self._open)

    async def tidy(self) -> None:
        """Removes what dead processes left, counts anew, evicts what is over the budget."""
        await asyncio.to_thread(self._tidy)

    @asynccontextmanager
    async def receive(self) -> AsyncIterator[Upload]:
        """An upload; what was not committed when the block ends is gone."""
        upload = await in_thread(self._begin, undo=Upload._discard)
        try:
            yield upload
        finally:
            try:
                await upload._settle()
            finally:
                await in_thread(upload._discard)

    async def commit(
        self,
        upload: Upload,
        video_id: str,
        probe: VideoProbe,
        owner: str,
        retention: Retention = FOREVER,
    ) -> VideoLease:
        """Stores a finished upload for its owner. What is there already stays as it is."""
        return await in_thread(
            lambda: self._commit(upload, video_id, probe, owner, retention),
            undo=VideoLease.release,
        )

    async def retain(self, video_id: str, owner: str, retention: Retention) -> VideoLease:
        """Leases a video that its owner uploads again, which may end later from now on.

        Raises: VideoNotFoundError.
        """
        return await in_thread(
            lambda: self._retain(video_id, owner, retention), undo=VideoLease.release
        )

    async def owned_by(self, owner: str) -> list[StoredVideo]:
        """All of an owner's, in no order."""
        return await asyncio.to_thread(self._owned_by, owner)

    async def expired(self) -> list[tuple[str, str]]:
        """Videos whose time is over, with their owners."""
        return await asyncio.to_thread(self._expired)

    async def drop_expired(self, video_id: str, owner: str) -> bool:
        """Removes a reference, and the video with its last one; False where it has been uploaded
        again meanwhile."""
        return await in_thread(lambda: self._drop_expired(video_id, owner))

    async def find(self, video_id: str, owner: str) -> StoredVideo:
        """Raises: VideoNotFoundError."""
        return await asyncio.to_thread(self._read_reference, video_id, owner)

    async def lease(self, video_id: str, owner: str) -> VideoLease:
        """Raises: VideoNotFoundError."""
        return await in_thread(lambda: self._lease(video_id, owner), undo=VideoLease.release)

    async def has_others(self, video_id: str, owner: str) -> bool:
        """Whether somebody else has the video too."""
        own = self._reference_path(video_id, owner)
        return bool(set(await asyncio.to_thread(self._references, video_id)) - {own})

    async def delete(self, video_id: str, owner: str) -> None:
        """Removes an owner's reference, and the video with its last one; a video that a job still
        reads goes with the next `tidy` after that.

        Raises: VideoNotFoundError.
        """
        await in_thread(lambda: self._delete(video_id, owner))

    # --- everything below blocks and runs in threads ---

    def _open(self) -> None:
        self._incoming.mkdir(parents=True, exist_ok=True)
        self._owners.mkdir(exist_ok=True, mode=0o700)
        self._tidy()

    def _begin(self) -> Upload:
        path = self._incoming / uuid.uuid4().hex
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        return Upload(self, path, fd, self._max_upload_bytes)

    def _commit(
        self,
        upload: Upload,
        video_id: str,
        probe: VideoProbe,
        owner: str,
        retention: Retention,
    ) -> VideoLease:
        with self._committing:
            with suppress(VideoNotFoundError):
                return self._joined(video_id, owner, retention)  # the upload is discarded
            fd = self._place(upload, video_id)
            try:
                video = StoredVideo(video_id, upload.num_bytes, time.time(), probe, retention)
                self._write_reference(video, owner)
            except BaseException:
                os.close(fd)
                raise
            return VideoLease(video, self._path(video_id), fd)

    def _retain(self, video_id: str, owner: str, retention: Retention) -> VideoLease:
        with self._committing:
            return self._joined(video_id, owner, retention)

    def _joined(self, video_id: str, owner: str, retention: Retention) -> VideoLease:
        lease = self._lease(video_id, owner)
        joined = lease.video.retention.joined(retention)
        if joined != lease.video.retention:
            lease.video = replace(lease.video, retention=joined)
            self._write_reference(lease.video, owner)
        return lease

    def _owned_by(self, owner: str) -> list[StoredVideo]:
        folder = self._directory if owner == ANONYMOUS else self._owners / owner
        videos = []
        with suppress(FileNotFoundError):
            for path, _ in _scan(folder):
                if path.suffix == ".json" and VIDEO_ID.fullmatch(path.stem):
                    with suppress(VideoNotFoundError):
                        videos.append(self._read_reference(path.stem, owner))
        return videos

    def _expired(self) -> list[tuple[str, str]]:
        found = []
        for folder in (self._directory, *_folders(self._owners)):
            owner = ANONYMOUS if folder == self._directory else folder.name
            for path, _ in _scan(folder):
                is_reference = path.suffix == ".json" and VIDEO_ID.fullmatch(path.stem)
                if is_reference and self._is_over(path):
                    found.append((path.stem, owner))
        return found

    def _is_over(self, reference: Path) -> bool:
        try:
            record: dict[str, Any] = json.loads(reference.read_bytes())
        except FileNotFoundError:
            return False
        return _retention(record).is_over

    def _drop_expired(self, video_id: str, owner: str) -> bool:
        with self._committing:
            reference = self._reference_path(video_id, owner)
            if not self._is_over(reference):
                return False
            reference.unlink(missing_ok=True)
        self._collect(video_id)
        return True

    def _place(self, upload: Upload, video_id: str) -> int:
        """Puts an upload in its place, where the same content may lie; returns its locked file."""
        while True:
            try:
                os.link(upload.path, self._path(video_id))  # unlike a rename, it replaces nothing
            except FileExistsError:
                with suppress(VideoNotFoundError):  # else it was removed just now
                    return self._lock(video_id)
            else:
                upload.path.unlink()
                return upload._hand_over()

    def _path(self, video_id: str) -> Path:
        if not VIDEO_ID.fullmatch(video_id):
            raise VideoNotFoundError("no such video")
        return self._directory / video_id

    def _reference_path(self, video_id: str, owner: str) -> Path:
        assert OWNER_ID.fullmatch(owner)
        path = self._path(video_id).with_suffix(".json")
        return path if owner == ANONYMOUS else self._owners / owner / path.name

    def _references(self, video_id: str) -> list[Path]:
        name = self._path(video_id).with_suffix(".json").name
        folders = [self._directory, *_folders(self._owners)]
        return [path for folder in folders if (path := folder / name).exists()]

    def _read_reference(self, video_id: str, owner: str) -> StoredVideo:
        video = self._parse_reference(video_id, owner)
        if not self._path(video_id).exists():
            raise VideoNotFoundError("no such video")
        return video

    def _parse_reference(self, video_id: str, owner: str) -> StoredVideo:
        """What a reference says, whether or not the video is still there."""
        try:
            text = self._reference_path(video_id, owner).read_bytes()
        except FileNotFoundError:
            raise VideoNotFoundError("no such video") from None
        record: dict[str, Any] = json.loads(text)
        retention = _retention(record)
        if retention.is_over:  # and removed soon
            raise VideoNotFoundError("no such video")
        probe = VideoProbe(**record["probe"])
        return StoredVideo(video_id, record["num_bytes"], record["created_at_s"], probe, retention)

    def _write_reference(self, video: StoredVideo, owner: str) -> None:
        record = asdict(video)
        del record["video_id"]
        path = self._reference_path(video.video_id, owner)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        temporary = self._incoming / uuid.uuid4().hex
        with temporary.open("w") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def _lease(self, video_id: str, owner: str) -> VideoLease:
        video = self._parse_reference(video_id, owner)
        return VideoLease(video, self._path(video_id), self._lock(video_id))

    def _lock(self, video_id: str) -> int:
        """The descriptor of a video that nobody removes until it is closed."""
        try:
            fd = os.open(self._path(video_id), os.O_RDONLY)
        except FileNotFoundError:
            raise VideoNotFoundError("no such video") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)  # waits for a removal under way, an instant
            if os.fstat(fd).st_nlink == 0:
                raise VideoNotFoundError("no such video")
            os.utime(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _delete(self, video_id: str, owner: str) -> None:
        self._read_reference(video_id, owner)
        self._reference_path(video_id, owner).unlink(missing_ok=True)
        self._collect(video_id)

    def _collect(self, video_id: str) -> None:
        """Removes a video without references, unless somebody uses it."""
        if not self._references(video_id):
            with suppress(VideoNotFoundError):
                self._remove(video_id, unless_referenced=True)

    def _remove(self, video_id: str, *, unless_referenced: bool = False) -> bool:
        """Removes a video and what refers to it; False where somebody uses it, or it is spared."""
        path = self._path(video_id)
        try:
            fd = os.open(path, os.O_RDWR)  # NFS locks exclusively only what is open for writing
        except FileNotFoundError:
            raise VideoNotFoundError("no such video") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink == 0:  # removed meanwhile; at the path lies a new upload
                raise VideoNotFoundError("no such video")
            references = self._references(video_id)
            if references and unless_referenced:
                return False
            # First: whoever finds no video finds no reference that is about to go.
            for reference in references:
                reference.unlink(missing_ok=True)
            num_bytes = os.fstat(fd).st_size
            path.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        self._give_back_room(num_bytes)
        return True

    # --- the byte budget ---

    @property
    def _used_bytes(self) -> int:
        """Exact after a scan."""
        return self._scanned_bytes + self._row.table.stored_bytes()

    def _take_room(self, num_bytes: int) -> None:
        with self._room:
            self._row.add_stored_bytes(num_bytes)
        if self._used_bytes > self._max_bytes:
            self._evict()
            if self._used_bytes > self._max_bytes:
                self._give_back_room(num_bytes)
                raise VideoStoreFullError("the video storage is full and every video is in use")

    def _give_back_room(self, num_bytes: int) -> None:
        with self._room:
            self._row.add_stored_bytes(-num_bytes)

    def _evict(self) -> None:
        """Removes videos by least recent use until the budget holds."""
        for _, video_id in sorted(
            (status.st_mtime, path.name)
            for path, status in _scan(self._directory)
            if VIDEO_ID.fullmatch(path.name)
        ):
            if self._used_bytes <= self._max_bytes:
                return
            with suppress(VideoNotFoundError):
                self._remove(video_id)

    def _tidy(self) -> None:
        for path, status in _scan(self._incoming):
            if _is_old(status):
                _remove_unlocked(path)
        for folder in (self._directory, *_folders(self._owners)):
            self._drop_dangling(folder)
        for path, _ in _scan(self._directory):
            if VIDEO_ID.fullmatch(path.name):
                self._collect(path.name)
        with self._room:
            counted_bytes = self._row.table.stored_bytes()
            self._scanned_bytes = -counted_bytes + sum(
                status.st_size
                for directory in (self._directory, self._incoming)
                for path, status in _scan(directory)
                if path.suffix != ".json"
            )
        self._evict()

    def _drop_dangling(self, folder: Path) -> None:
        """Removes references to videos that are gone."""
        for path, status in _scan(folder):
            is_reference = path.suffix == ".json" and _is_old(status)
            if is_reference and not (self._directory / path.stem).exists():
                path.unlink(missing_ok=True)


def _scan(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files of a directory; those that vanish meanwhile are left out."""
    with os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    yield Path(entry.path), entry.stat(follow_symlinks=False)


def _folders(directory: Path) -> list[Path]:
    with os.scandir(directory) as entries:
        return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]


def _retention(record: dict[str, Any]) -> Retention:
    """Of a reference; those of earlier releases say nothing."""
    return Retention(**record.get("retention", {}))


def _is_old(status: os.stat_result) -> bool:
    return time.time() - status.st_mtime > UNLOCKED_GRACE_S


def _remove_unlocked(path: Path) -> None:
    with suppress(FileNotFoundError, BlockingIOError):
        fd = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        finally:
            os.close(fd)
