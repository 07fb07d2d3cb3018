"""How much is stored and how much is coming in, of all API processes of this machine.

Counts alone: what is removed to make room is the store's to say. Exact after a scan; what other
machines store in the directory is known from scans, up to a minute old.
"""

import threading

from app.errors import TooManyUploadsError
from app.process_table import ProcessRow


class Room:
    """
    Args:
        row: of this process, among those that may use the directory at the same time.
        max_bytes, max_videos: stored.
        max_incoming_bytes: of uploads under way, all together.
    """

    def __init__(
        self, row: ProcessRow, *, max_bytes: int, max_videos: int, max_incoming_bytes: int
    ) -> None:
        self._row = row
        self.max_bytes = max_bytes
        self._max_videos = max_videos
        self._max_incoming_bytes = max_incoming_bytes
        self._scanned_bytes = 0  # beyond what the processes' table counts
        self._scanned_videos = 0  # likewise
        self._guard = threading.Lock()  # of this process' row, and of both

    @property
    def used_bytes(self) -> int:
        return self._scanned_bytes + self._row.table.stored_bytes()

    @property
    def num_videos(self) -> int:
        return self._scanned_videos + self._row.table.stored_videos()

    @property
    def is_over(self) -> bool:
        return self.used_bytes > self.max_bytes or self.num_videos > self._max_videos

    def take_incoming(self, num_bytes: int) -> None:
        """Counts bytes of an upload, before they are written.

        Raises:
            TooManyUploadsError: all uploads together have no room for them.
        """
        with self._guard:
            self._row.add_incoming_bytes(num_bytes)
        if self._row.table.incoming_bytes() > self._max_incoming_bytes:
            self.give_back_incoming(num_bytes)
            raise TooManyUploadsError("the uploads under way take all the room there is for them")

    def give_back_incoming(self, num_bytes: int) -> None:
        with self._guard:
            self._row.add_incoming_bytes(-num_bytes)

    def add_video(self, num_bytes: int) -> None:
        with self._guard:
            self._row.add_stored(num_bytes, 1)

    def remove_video(self, num_bytes: int) -> None:
        with self._guard:
            self._row.add_stored(-num_bytes, -1)

    def set_scanned(self, num_bytes: int, num_videos: int) -> None:
        """Takes over what a scan has found stored."""
        with self._guard:
            self._scanned_bytes = num_bytes - self._row.table.stored_bytes()
            self._scanned_videos = num_videos - self._row.table.stored_videos()
