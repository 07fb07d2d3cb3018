"""The description of a stored video, and the lease that keeps it."""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from dycoke_core.video import VideoProbe

VIDEO_ID = re.compile(r"vid_[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class StoredVideo:
    """A video as one owner sees it."""

    video_id: str
    num_bytes: int
    created_at_s: float  # Unix time at which this owner uploaded it
    probe: VideoProbe
    retention: "Retention"


@dataclass(frozen=True, slots=True)
class Retention:
    """What an upload says of how long its video stays, and of what it is for.

    Args:
        expires_at_s: Unix time; None: until it is deleted, or its bytes are needed.
        purpose: stored and shown, without any effect.
    """

    expires_at_s: float | None = None
    purpose: str = "user_data"

    @property
    def is_over(self) -> bool:
        return self.expires_at_s is not None and self.expires_at_s <= time.time()

    def joined(self, other: "Retention") -> "Retention":
        """Of a video that is uploaded again: the later end counts, and the later purpose."""
        ends = (self.expires_at_s, other.expires_at_s)
        return Retention(None if None in ends else max(e for e in ends if e), other.purpose)


FOREVER = Retention()


@dataclass(frozen=True, slots=True)
class StorageQuota:
    """How much one owner may have stored; None: as much as there is room for."""

    max_bytes: int | None = None
    max_videos: int | None = None

    def has_room(self, num_bytes: int, num_videos: int) -> bool:
        """Whether this much in all is within it."""
        return (self.max_bytes is None or num_bytes <= self.max_bytes) and (
            self.max_videos is None or num_videos <= self.max_videos
        )


NO_STORAGE_QUOTA = StorageQuota()


@dataclass(slots=True, eq=False)
class VideoLease:
    """A stored video, which is not removed until `release`."""

    video: StoredVideo
    path: Path
    _fd: int | None

    def __del__(self) -> None:
        self.release()  # a net: a lease can be lost between two tasks when one is cancelled

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
