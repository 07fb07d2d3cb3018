"""Uploaded videos on disk, by content.

    {directory}/vid_<sha256>         a video; its modification time is its last use
    {directory}/vid_<sha256>.json    what the probe said; exists whenever the video does
    {directory}/incoming/<random>    uploads under way

Several API processes may share the directory. Whoever uses a file holds a shared `flock` on it, and
nothing is removed without the exclusive one, so neither eviction nor DELETE takes a video from
under a live job, in this process or another; a lock ends with its process. The byte budget counts
uploads under way, those of all API processes of this machine; what other machines store in the
directory is known from a scan up to a minute old.

Knows neither HTTP nor what a video is. No file name of a client's is kept.
"""

import asyncio
import errno
import fcntl
import hashlib
import json
import os
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from app.errors import UploadTooLargeError, VideoInUseError, VideoNotFoundError, VideoStoreFullError
from app.process_table import ProcessRow
from dycoke_core.video import SNIFF_BYTES, VideoProbe

FLUSH_BYTES = 1 << 20  # one thread hop, write and hash per this much
UNLOCKED_GRACE_S = 60.0  # a file may be this young and not locked yet
VIDEO_ID = re.compile(r"vid_[0-9a-f]{64}")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredVideo:
    video_id: str
    num_bytes: int
    created_at_s: float  # Unix time
    probe: VideoProbe


@dataclass(slots=True, eq=False)
class VideoLease:
    """A stored video that nobody removes until `release`."""

    video: StoredVideo
    path: Path
    _fd: int | None

    def __del__(self) -> None:
        self.release()  # a net: a lease can be lost between two tasks when one is cancelled

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class Upload:
    """One video on its way in. Bytes are written and hashed in threads, never on the event loop."""

    def __init__(self, store: "VideoStore", path: Path, fd: int, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._store = store
        self._fd: int | None = fd
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._head = b""
        self._room_bytes = 0  # of the store's budget

    @property
    def head(self) -> bytes:
        """The first bytes, enough to tell one container from another."""
        return self._head

    async def write(self, chunk: bytes) -> None:
        """Takes the next bytes.

        Raises:
            UploadTooLargeError: as soon as the cap is passed.
            VideoStoreFullError: no room, and every stored video is in use.
        """
        self.num_bytes += len(chunk)
        if self.num_bytes > self.max_bytes:
            raise UploadTooLargeError(f"the video is larger than {self.max_bytes} bytes")
        if len(self._head) < SNIFF_BYTES:
            self._head += bytes(chunk[: SNIFF_BYTES - len(self._head)])
        self._buffer += chunk
        if len(self._buffer) >= FLUSH_BYTES:
            await self._flush()

    async def finish(self) -> str:
        """Writes what is left and returns the video's id."""
        await self._flush(is_last=True)
        return f"vid_{self._hash.hexdigest()}"

    async def _flush(self, is_last: bool = False) -> None:
        data, self._buffer = self._buffer, bytearray()
        await _in_thread(lambda: self._write(data, is_last))

    def _write(self, data: bytearray, is_last: bool) -> None:
        assert self._fd is not None
        self._store._take_room(len(data))
        self._room_bytes += len(data)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            if is_last:
                os.fsync(self._fd)  # a power cut must not leave other bytes under this digest
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise VideoStoreFullError("the video storage is full") from error
            raise
        self._hash.update(data)

    def _hand_over(self) -> int:
        """Gives up the locked descriptor to whoever holds the video from now on."""
        fd, self._fd = self._fd, None
        assert fd is not None
        self._room_bytes = 0
        return fd

    def _discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._store._give_back_room(self._room_bytes)
        self._room_bytes = 0
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


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
        upload = await _in_thread(self._begin, undo=Upload._discard)
        try:
            yield upload
        finally:
            await _in_thread(upload._discard)

    async def commit(self, upload: Upload, video_id: str, probe: VideoProbe) -> VideoLease:
        """Stores a finished upload under its id, or finds the same content there already."""
        return await _in_thread(
            lambda: self._commit(upload, video_id, probe), undo=VideoLease.release
        )

    async def find(self, video_id: str) -> StoredVideo:
        """Raises: VideoNotFoundError."""
        return await asyncio.to_thread(self._read_record, video_id)

    async def lease(self, video_id: str) -> VideoLease:
        """Raises: VideoNotFoundError."""
        return await _in_thread(lambda: self._lease(video_id), undo=VideoLease.release)

    async def delete(self, video_id: str) -> None:
        """Raises: VideoNotFoundError, VideoInUseError."""
        if not await asyncio.to_thread(self._remove, video_id):
            raise VideoInUseError("a job still reads this video; try again when it has begun")

    # --- everything below blocks and runs in threads ---

    def _open(self) -> None:
        self._incoming.mkdir(parents=True, exist_ok=True)
        self._tidy()

    def _begin(self) -> Upload:
        path = self._incoming / uuid.uuid4().hex
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        return Upload(self, path, fd, self._max_upload_bytes)

    def _commit(self, upload: Upload, video_id: str, probe: VideoProbe) -> VideoLease:
        with self._committing:
            with suppress(VideoNotFoundError):
                return self._lease(video_id)  # the same content is there; the upload is discarded
            video = StoredVideo(video_id, upload.num_bytes, time.time(), probe)
            self._write_record(video)
            try:
                os.link(upload.path, self._path(video_id))  # unlike a rename, it replaces nothing
            except FileExistsError:  # another process was faster
                return self._lease(video_id)
            upload.path.unlink()
            return VideoLease(video, self._path(video_id), upload._hand_over())

    def _path(self, video_id: str) -> Path:
        if not VIDEO_ID.fullmatch(video_id):
            raise VideoNotFoundError("no such video")
        return self._directory / video_id

    def _record_path(self, video_id: str) -> Path:
        return self._path(video_id).with_suffix(".json")

    def _read_record(self, video_id: str) -> StoredVideo:
        try:
            record: dict[str, Any] = json.loads(self._record_path(video_id).read_bytes())
            self._path(video_id).stat()
        except FileNotFoundError:
            raise VideoNotFoundError("no such video") from None
        return StoredVideo(
            video_id, record["num_bytes"], record["created_at_s"], VideoProbe(**record["probe"])
        )

    def _write_record(self, video: StoredVideo) -> None:
        record = asdict(video)
        del record["video_id"]
        temporary = self._incoming / uuid.uuid4().hex
        with temporary.open("w") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._record_path(video.video_id))

    def _lease(self, video_id: str) -> VideoLease:
        path = self._path(video_id)
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise VideoNotFoundError("no such video") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)  # waits for a removal under way, an instant
            if os.fstat(fd).st_nlink == 0:
                raise VideoNotFoundError("no such video")
            video = self._read_record(video_id)
            os.utime(fd)
        except BaseException:
            os.close(fd)
            raise
        return VideoLease(video, path, fd)

    def _remove(self, video_id: str) -> bool:
        """Removes a video and its record; False where somebody uses it."""
        path = self._path(video_id)
        try:
            fd = os.open(path, os.O_RDWR)  # NFS locks exclusively only what is open for writing
        except FileNotFoundError:
            raise VideoNotFoundError("no such video") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink == 0:  # removed meanwhile; at the path lies a new upload
                raise VideoNotFoundError("no such video")
            # The record first: whoever finds no video finds no record that is about to go.
            self._record_path(video_id).unlink(missing_ok=True)
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
        for path, status in _scan(self._directory):
            if path.suffix == ".json" and _is_old(status) and not path.with_suffix("").exists():
                path.unlink(missing_ok=True)
        with self._room:
            counted_bytes = self._row.table.stored_bytes()
            self._scanned_bytes = -counted_bytes + sum(
                status.st_size
                for directory in (self._directory, self._incoming)
                for path, status in _scan(directory)
                if path.suffix != ".json"
            )
        self._evict()


async def _in_thread(work: Callable[[], T], undo: Callable[[T], None] | None = None) -> T:
    """Runs `work` in a thread, to its end even if the caller is cancelled: a thread cannot be
    stopped, and what it uses (a descriptor!) must not be closed under it. Then `undo` takes back
    what nobody received.
    """
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if task.exception() is None and undo is not None:
            undo(task.result())
        raise


def _scan(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files of a directory; those that vanish meanwhile are left out."""
    with os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    yield Path(entry.path), entry.stat(follow_symlinks=False)


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
