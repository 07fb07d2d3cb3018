"""Which owner may see which video, and what it knows of it: a small file per owner and video.

Knows nothing of the videos' own files. Code that writes or removes a reference which others may
want at the same time holds the directory's lock (`store`). Everything here blocks.
"""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.errors import VideoNotFoundError
from app.keys.entries import ANONYMOUS, OWNER_ID
from app.video_store.disk import folders, is_old, scan
from app.video_store.types import VIDEO_ID, Retention, StoredVideo
from dycoke_core.video import VideoProbe


@dataclass(frozen=True, slots=True)
class Entry:
    """A reference without what its video's headers say.

    Args:
        created_at_s: as of `StoredVideo`.
    """

    video_id: str
    created_at_s: float
    retention: Retention


@dataclass(frozen=True, slots=True)
class _Read:
    """What a file said when it was that file."""

    inode: int
    changed_at_ns: int
    entry: Entry


class References:
    """
    Args:
        incoming: a folder for files that are being written.
    """

    def __init__(self, directory: Path, incoming: Path) -> None:
        self._directory = directory
        self._owners = directory / "owners"
        self._incoming = incoming
        self._read: dict[Path, _Read] = {}  # so that a file is read once, not every time

    def open(self) -> None:
        self._owners.mkdir(exist_ok=True, mode=0o700)

    def path(self, video_id: str, owner: str) -> Path:
        """Raises VideoNotFoundError: such an id no video has."""
        assert OWNER_ID.fullmatch(owner)
        if not VIDEO_ID.fullmatch(video_id):
            raise VideoNotFoundError
        return self._folder(owner) / f"{video_id}.json"

    def paths_of(self, video_id: str) -> list[Path]:
        """All references to a video."""
        name = f"{video_id}.json"
        return [path for folder, _ in self._folders() if (path := folder / name).exists()]

    def read(self, video_id: str, owner: str) -> StoredVideo:
        """What a reference says, whether or not the video is still there.

        Raises: VideoNotFoundError.
        """
        try:
            text = self.path(video_id, owner).read_bytes()
        except FileNotFoundError:
            raise VideoNotFoundError from None
        record: dict[str, Any] = json.loads(text)
        retention = _retention(record)
        if retention.is_over:  # and removed soon
            raise VideoNotFoundError
        probe = VideoProbe(**record["probe"])
        return StoredVideo(video_id, record["num_bytes"], record["created_at_s"], probe, retention)

    def write(self, video: StoredVideo, owner: str) -> None:
        record = asdict(video)
        del record["video_id"]
        path = self.path(video.video_id, owner)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        temporary = self._incoming / uuid.uuid4().hex
        try:
            with temporary.open("w") as file:
                json.dump(record, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def remove(self, video_id: str, owner: str) -> None:
        self.path(video_id, owner).unlink(missing_ok=True)

    def touch(self, video_id: str, owner: str) -> None:
        """Notes that the owner uses the video now: private to it, unlike the video's own last
        use."""
        with suppress(FileNotFoundError):
            os.utime(self.path(video_id, owner))

    def uses_of(self, owner: str) -> list[tuple[int, str]]:
        """When the owner has last used each of its videos, in ns of Unix time, and which it is."""
        with suppress(FileNotFoundError):
            return [(status.st_mtime_ns, path.stem) for path, status in self._of(owner)]
        return []

    def entries_of(self, owner: str) -> list[Entry]:
        """All of an owner's references whose time is not over, in no order."""
        entries = []
        with suppress(FileNotFoundError):
            for path, status in self._of(owner):
                with suppress(FileNotFoundError):
                    self._read[path] = found = self._look_up(path, status)
                    entries.append(found.entry)
        return [entry for entry in entries if not entry.retention.is_over]

    def compare(self, video_ids: set[str]) -> tuple[list[Path], set[str]]:
        """Holds all references against the videos that there are.

        Returns:
            Those that are old enough and of none of these videos; the videos that have one.
        """
        dangling, referenced = [], set()
        for folder, _ in self._folders():
            for path, status in self._in(folder):
                if path.stem in video_ids:
                    referenced.add(path.stem)
                elif is_old(status):
                    dangling.append(path)
        return dangling, referenced

    def expired(self) -> list[tuple[str, str]]:
        """Videos whose time is over, with their owners."""
        read: dict[Path, _Read] = {}
        found = []
        for folder, owner in self._folders():
            for path, status in self._in(folder):
                with suppress(FileNotFoundError):
                    read[path] = self._look_up(path, status)
                    if read[path].entry.retention.is_over:
                        found.append((path.stem, owner))
        self._read = read
        return found

    def is_over(self, video_id: str, owner: str) -> bool:
        """Whether a video's time is over for its owner; also False where there is none."""
        try:
            return _retention(json.loads(self.path(video_id, owner).read_bytes())).is_over
        except FileNotFoundError:
            return False

    def _look_up(self, path: Path, status: os.stat_result) -> _Read:
        known = self._read.get(path)
        if known and (known.inode, known.changed_at_ns) == (status.st_ino, status.st_mtime_ns):
            return known
        record = json.loads(path.read_bytes())
        entry = Entry(path.stem, record["created_at_s"], _retention(record))
        return _Read(status.st_ino, status.st_mtime_ns, entry)

    def _folder(self, owner: str) -> Path:
        return self._directory if owner == ANONYMOUS else self._owners / owner

    def _folders(self) -> Iterator[tuple[Path, str]]:
        """Every folder with references, and whose they are."""
        yield self._directory, ANONYMOUS
        for folder in folders(self._owners):
            yield folder, folder.name

    def _of(self, owner: str) -> Iterator[tuple[Path, os.stat_result]]:
        return self._in(self._folder(owner))

    def _in(self, folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
        for path, status in scan(folder):
            if path.suffix == ".json" and VIDEO_ID.fullmatch(path.stem):
                yield path, status


def _retention(record: dict[str, Any]) -> Retention:
    """Of a reference; those of earlier releases say nothing."""
    return Retention(**record.get("retention", {}))
