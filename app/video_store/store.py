"""The store itself: what is stored, found, leased, displaced and removed."""

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

from app.errors import UploadTooLargeError, VideoNotFoundError, VideoStoreFullError
from app.keys.entries import ANONYMOUS
from app.process_table import ProcessRow
from app.threads import in_thread
from app.video_store.disk import DirectoryLock, full_disk_told, is_old, remove_unlocked, scan
from app.video_store.incoming import Upload
from app.video_store.references import References
from app.video_store.room import Room
from app.video_store.types import (
    FOREVER,
    NO_STORAGE_QUOTA,
    VIDEO_ID,
    Retention,
    StorageQuota,
    StoredVideo,
    VideoLease,
)
from dycoke_core.video import VideoProbe


class VideoStore:
    """
    Args:
        max_bytes, max_videos: stored, of all owners; the least recently used go first.
        max_upload_bytes: of one video.
        max_incoming_bytes: of all uploads under way.
        row: of this process, among those that may use the directory at the same time.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int,
        max_videos: int,
        max_upload_bytes: int,
        max_incoming_bytes: int,
        row: ProcessRow,
    ) -> None:
        self._max_upload_bytes = max_upload_bytes
        self._directory = directory
        self._incoming = directory / "incoming"
        self._references = References(directory, self._incoming)
        self.room = Room(
            row,
            max_bytes=max_bytes,
            max_videos=max_videos,
            max_upload_bytes=max_upload_bytes,
            max_incoming_bytes=max_incoming_bytes,
        )
        self._lock = DirectoryLock(directory / ".lock")

    async def open(self) -> None:
        await asyncio.to_thread(self._open)

    async def tidy(self) -> None:
        """Removes what dead processes left, counts again, evicts what is over the budget."""
        await asyncio.to_thread(self._tidy)

    @asynccontextmanager
    async def receive(self, owner: str = ANONYMOUS) -> AsyncIterator[Upload]:
        """An upload; what is not committed when the block ends is gone.

        Args:
            owner: has a share of what may come in at a time; all owners together have all of it.
        """
        upload = await in_thread(
            lambda: Upload.begin(self.room, self._incoming, self._max_upload_bytes, owner),
            undo=Upload.discard,
        )
        try:
            yield upload
        finally:
            try:
                await upload.settle()
            finally:
                await in_thread(upload.discard)

    async def commit(
        self,
        upload: Upload,
        video_id: str,
        probe: VideoProbe,
        owner: str,
        retention: Retention = FOREVER,
        quota: StorageQuota = NO_STORAGE_QUOTA,
    ) -> VideoLease:
        """Stores a finished upload for its owner. What is there already stays as it is.

        Nothing is displaced for it before: first the owner's own videos, where it would pass its
        quota, then anybody's, where the store's budget is passed.

        Raises:
            UploadTooLargeError: it is larger than the quota.
            VideoStoreFullError: no room, and every stored video is in use.
        """
        return await in_thread(
            lambda: self._commit(upload, video_id, probe, owner, retention, quota),
            undo=VideoLease.release,
        )

    async def retain(self, video_id: str, owner: str, retention: Retention) -> VideoLease:
        """Leases a video that its owner uploads again, which may end later from now on.

        Raises: VideoNotFoundError.
        """
        return await in_thread(
            lambda: self._retain(video_id, owner, retention), undo=VideoLease.release
        )

    async def page(
        self,
        owner: str,
        *,
        limit: int,
        purpose: str | None = None,
        after: str | None = None,
        newest_first: bool = True,
    ) -> tuple[list[StoredVideo], bool]:
        """Some of an owner's videos in the order of their uploads, and whether there are more.

        Looks at all of them, which takes a thread a moment: callers take turns.

        Args:
            purpose: of these alone.
            after: the last one of the page before.

        Raises:
            VideoNotFoundError: `after` is none of them.
        """
        return await asyncio.to_thread(self._page, owner, limit, purpose, after, newest_first)

    async def expired(self) -> list[tuple[str, str]]:
        """Videos whose time is over, with their owners."""
        return await asyncio.to_thread(self._references.expired)

    async def drop_expired(self, video_id: str, owner: str) -> bool:
        """Removes a reference, and the video with its last one; False where it has been uploaded
        again meanwhile."""
        return await in_thread(lambda: self._drop_expired(video_id, owner))

    async def find(self, video_id: str, owner: str) -> StoredVideo:
        """Raises: VideoNotFoundError."""
        return await asyncio.to_thread(self._find, video_id, owner)

    async def lease(self, video_id: str, owner: str) -> VideoLease:
        """Raises: VideoNotFoundError."""
        return await in_thread(lambda: self._lease(video_id, owner), undo=VideoLease.release)

    async def has_others(self, video_id: str, owner: str) -> bool:
        """Whether somebody else has the video too."""
        own = self._references.path(video_id, owner)
        return bool(set(await asyncio.to_thread(self._references.paths_of, video_id)) - {own})

    async def delete(self, video_id: str, owner: str) -> None:
        """Removes an owner's reference, and the video with its last one; a video that a job still
        reads goes with the next `tidy` after that.

        Raises: VideoNotFoundError.
        """
        await in_thread(lambda: self._delete(video_id, owner))

    # --- everything below blocks and runs in threads ---

    def _open(self) -> None:
        self._incoming.mkdir(parents=True, exist_ok=True)
        self._references.open()
        self._tidy()

    def _commit(
        self,
        upload: Upload,
        video_id: str,
        probe: VideoProbe,
        owner: str,
        retention: Retention,
        quota: StorageQuota,
    ) -> VideoLease:
        with full_disk_told(), self._lock.held():
            with suppress(VideoNotFoundError):
                return self._joined(video_id, owner, retention)  # the upload is discarded
            displaced = self._beyond_quota(owner, video_id, upload.num_bytes, quota)
            fd = self._place(upload, video_id)
            try:
                for other_id in displaced:
                    self._references.remove(other_id, owner)
                    self._collect(other_id)
                video = StoredVideo(video_id, upload.num_bytes, time.time(), probe, retention)
                self._references.write(video, owner)
            except BaseException:
                os.close(fd)
                self._collect(video_id)
                raise
            return VideoLease(video, self.path_of(video_id), fd)

    def _retain(self, video_id: str, owner: str, retention: Retention) -> VideoLease:
        with full_disk_told(), self._lock.held():
            return self._joined(video_id, owner, retention)

    def _joined(self, video_id: str, owner: str, retention: Retention) -> VideoLease:
        lease = self._lease(video_id, owner)
        joined = lease.video.retention.joined(retention)
        if joined != lease.video.retention:
            lease.video = replace(lease.video, retention=joined)
            self._references.write(lease.video, owner)
        return lease

    def _page(
        self, owner: str, limit: int, purpose: str | None, after: str | None, newest_first: bool
    ) -> tuple[list[StoredVideo], bool]:
        uploads = sorted(
            (entry.created_at_s, entry.video_id)
            for entry in self._references.entries_of(owner)
            if purpose in (None, entry.retention.purpose)
        )
        ids = [video_id for _, video_id in (reversed(uploads) if newest_first else uploads)]
        if after is not None:
            if after not in ids:
                raise VideoNotFoundError
            ids = ids[ids.index(after) + 1 :]
        videos = []
        for video_id in ids[:limit]:
            with suppress(VideoNotFoundError):
                videos.append(self._find(video_id, owner))
        return videos, len(ids) > limit

    def _find(self, video_id: str, owner: str) -> StoredVideo:
        video = self._references.read(video_id, owner)
        if not self.path_of(video_id).exists():
            raise VideoNotFoundError
        return video

    def _drop_expired(self, video_id: str, owner: str) -> bool:
        with self._lock.held():
            if not self._references.is_over(video_id, owner):
                return False
            self._references.remove(video_id, owner)
            self._collect(video_id)
        return True

    def path_of(self, video_id: str) -> Path:
        if not VIDEO_ID.fullmatch(video_id):
            raise VideoNotFoundError
        return self._directory / video_id

    def _place(self, upload: Upload, video_id: str) -> int:
        """Puts an upload in its place, where the same content may lie; returns its locked file."""
        with suppress(VideoNotFoundError):
            return self._lock_file(video_id)
        self._make_room(upload.num_bytes)
        try:
            os.link(upload.path, self.path_of(video_id))  # unlike a rename, it replaces nothing
        except BaseException as error:
            self.room.remove_video(upload.num_bytes)
            if isinstance(error, FileExistsError):  # a process of an earlier release was faster
                return self._lock_file(video_id)
            raise
        upload.path.unlink()
        return upload.hand_over()

    def _lease(self, video_id: str, owner: str) -> VideoLease:
        video = self._references.read(video_id, owner)
        lease = VideoLease(video, self.path_of(video_id), self._lock_file(video_id))
        self._references.touch(video_id, owner)
        return lease

    def _lock_file(self, video_id: str) -> int:
        """The descriptor of a video, which is not removed until it is closed."""
        try:
            fd = os.open(self.path_of(video_id), os.O_RDONLY)
        except FileNotFoundError:
            raise VideoNotFoundError from None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)  # waits for a removal under way, an instant
            if os.fstat(fd).st_nlink == 0:
                raise VideoNotFoundError
            os.utime(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _delete(self, video_id: str, owner: str) -> None:
        with self._lock.held():
            self._find(video_id, owner)
            self._references.remove(video_id, owner)
            self._collect(video_id)

    def _collect(self, video_id: str) -> None:
        """Removes a video without references, unless somebody uses it."""
        if not self._references.paths_of(video_id):
            with suppress(VideoNotFoundError):
                self.remove_unused(video_id, unless_referenced=True)

    def remove_unused(self, video_id: str, *, unless_referenced: bool = False) -> bool:
        """Removes a video and what refers to it; False where somebody uses it, or it is spared."""
        path = self.path_of(video_id)
        try:
            fd = os.open(path, os.O_RDWR)  # NFS locks exclusively only what is open for writing
        except FileNotFoundError:
            raise VideoNotFoundError from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink == 0:  # removed meanwhile; at the path lies a new upload
                raise VideoNotFoundError
            references = self._references.paths_of(video_id)
            if references and unless_referenced:
                return False
            # First: where no video is found, no reference is found that is about to go.
            for reference in references:
                reference.unlink(missing_ok=True)
            num_bytes = os.fstat(fd).st_size
            path.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        self.room.remove_video(num_bytes)
        return True

    # --- what makes room ---

    def _beyond_quota(
        self, owner: str, new_id: str, num_bytes: int, quota: StorageQuota
    ) -> list[str]:
        """An owner's least recently used videos that a new one leaves no room for in its quota.

        Raises UploadTooLargeError: the new one alone is larger.
        """
        if quota == NO_STORAGE_QUOTA:
            return []
        if not quota.has_room(num_bytes, 1):
            raise UploadTooLargeError(
                f"the video has {num_bytes} bytes, and this API key may store {quota.max_bytes} "
                "(DYCOKE_KEY_MAX_STORED_BYTES, or a limit of its own)"
            )
        owned = sorted(use for use in self._uses_of(owner) if use[1] != new_id)
        total_bytes = num_bytes + sum(size for _, _, size in owned)
        displaced: list[str] = []
        for _, video_id, size in owned:
            if quota.has_room(total_bytes, len(owned) - len(displaced) + 1):
                break
            displaced.append(video_id)
            total_bytes -= size
        return displaced

    def _uses_of(self, owner: str) -> Iterator[tuple[int, str, int]]:
        """The owner's last use, id and bytes of each of its videos."""
        for used_at_ns, video_id in self._references.uses_of(owner):
            with suppress(FileNotFoundError):
                yield used_at_ns, video_id, self.path_of(video_id).stat().st_size

    def _make_room(self, num_bytes: int) -> None:
        """Counts one more video, for which others are removed where it takes that."""
        self.room.add_video(num_bytes)
        if self.room.is_over and num_bytes <= self.room.max_bytes:
            self._evict()
        if self.room.is_over:
            self.room.remove_video(num_bytes)
            raise VideoStoreFullError(
                "the video storage is full and every video is in use: try again later "
                "(DYCOKE_MAX_VIDEO_STORE_BYTES, DYCOKE_MAX_STORED_VIDEOS)"
            )

    def _evict(self) -> None:
        """Removes videos by least recent use until the budget holds."""
        for _, video_id in sorted((status.st_mtime, path.name) for path, status in self._files()):
            if not self.room.is_over:
                return
            with suppress(VideoNotFoundError):
                self.remove_unused(video_id)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The stored videos' files."""
        for path, status in scan(self._directory):
            if VIDEO_ID.fullmatch(path.name):
                yield path, status

    def _tidy(self) -> None:
        for path, status in scan(self._incoming):
            if is_old(status):
                remove_unlocked(path)
        self._drop_loose_ends()
        sizes = [status.st_size for _, status in self._files()]
        self.room.set_scanned(sum(sizes), len(sizes))
        if self.room.is_over:
            with self._lock.held():
                self._evict()

    def _drop_loose_ends(self) -> None:
        """Removes references to videos that are gone, and videos without a reference.

        Scans every folder once. What a commit does meanwhile looks like a loose end too: each is
        looked at again under the lock.
        """
        stored = {path.name for path, _ in self._files()}
        dangling, referenced = self._references.compare(stored)
        for reference in dangling:
            with self._lock.held():
                if not self.path_of(reference.stem).exists():
                    reference.unlink(missing_ok=True)
        for video_id in sorted(stored - referenced):
            with self._lock.held():
                self._collect(video_id)
