"""A video that is being uploaded. Its bytes count as incoming until it is stored or given up."""

import asyncio
import fcntl
import hashlib
import os
import uuid
from pathlib import Path

from app.errors import UploadTooLargeError
from app.threads import outlast
from app.video_store.disk import full_disk_told
from app.video_store.room import Room
from dycoke_core.video import SNIFF_BYTES

FLUSH_BYTES = 1 << 20  # one thread hop, write and hash per this much


class Upload:
    """One video on its way in. Bytes are written and hashed in threads, never on the event loop,
    while the next ones come in: at most two buffers of `FLUSH_BYTES` are held.
    """

    def __init__(self, room: Room, path: Path, fd: int, max_bytes: int, owner: str) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._room = room
        self._owner = owner
        self._fd: int | None = fd
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._writing: asyncio.Future[None] | None = None  # the buffer before
        self._head = b""
        self._room_bytes = 0  # that count as coming in

    @classmethod
    def begin(cls, room: Room, directory: Path, max_bytes: int, owner: str) -> "Upload":
        """Makes its file. Blocks. Raises: VideoStoreFullError."""
        path = directory / uuid.uuid4().hex
        with full_disk_told():
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        return cls(room, path, fd, max_bytes, owner)

    @property
    def head(self) -> bytes:
        """The first bytes, enough to tell one container from another."""
        return self._head

    async def write(self, chunk: bytes) -> None:
        """Takes the next bytes.

        Raises:
            UploadTooLargeError: as soon as the cap is passed.
            TooManyUploadsError: all uploads under way, or the owner's, have no room for it.
            VideoStoreFullError: the disk is full.
        """
        self.num_bytes += len(chunk)
        if self.num_bytes > self.max_bytes:
            raise UploadTooLargeError.of_video(self.max_bytes)
        if len(self._head) < SNIFF_BYTES:
            self._head += bytes(chunk[: SNIFF_BYTES - len(self._head)])
        self._buffer += chunk
        if len(self._buffer) >= FLUSH_BYTES:
            await self._flush()

    async def finish(self) -> str:
        """Writes what is left and returns the video's id."""
        await self._flush(is_last=True)
        return f"vid_{self._hash.hexdigest()}"

    async def settle(self) -> None:
        """Waits for what is being written: the descriptor must not be closed under it."""
        if self._writing is not None:
            await outlast(self._writing)
            self._writing.exception()  # the caller that wrote more, or finished, has had the error

    def hand_over(self) -> int:
        """Hands the locked descriptor to the video's next holder."""
        fd, self._fd = self._fd, None
        assert fd is not None
        self._leave_room()
        return fd

    def discard(self) -> None:
        """Removes what has not been handed over. Blocks."""
        self.path.unlink(missing_ok=True)
        self._leave_room()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    async def _flush(self, is_last: bool = False) -> None:
        """Starts to write what has come, once what came before it is written."""
        data, self._buffer = self._buffer, bytearray()
        if self._writing is not None:
            await asyncio.shield(self._writing)
        loop = asyncio.get_running_loop()
        self._writing = loop.run_in_executor(None, self._write, data, is_last)
        if is_last:
            await asyncio.shield(self._writing)

    def _write(self, data: bytearray, is_last: bool) -> None:
        assert self._fd is not None
        self._room.take_incoming(self._owner, len(data))
        self._room_bytes += len(data)
        with full_disk_told():
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            if is_last:
                os.fsync(self._fd)  # a power cut must not leave other bytes under this digest
        self._hash.update(data)

    def _leave_room(self) -> None:
        self._room.give_back_incoming(self._owner, self._room_bytes)
        self._room_bytes = 0
