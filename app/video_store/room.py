"""Counts how much is stored and how much is being uploaded, over all API processes of this machine.

It only counts; the store decides what is removed to make room. The counts are exact after a scan;
what other machines store in the directory is known from scans, so it may be a minute old.
"""

import threading

from app.errors import TooManyUploadsError
from app.keys.entries import ANONYMOUS
from app.process_table import ProcessRow


class Room:
    """
    Args:
        row: of this process, among those that may use the directory at the same time.
        max_bytes, max_videos: stored.
        max_upload_bytes: of one upload.
        max_incoming_bytes: of uploads under way, all together.
    """

    def __init__(
        self,
        row: ProcessRow,
        *,
        max_bytes: int,
        max_videos: int,
        max_upload_bytes: int,
        max_incoming_bytes: int,
    ) -> None:
        self._row = row
        self.max_bytes = max_bytes
        self._max_videos = max_videos
        self._max_upload_bytes = max_upload_bytes
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

    def take_incoming(self, owner: str, num_bytes: int) -> None:
        """Counts bytes of an upload, before they are written.

        An owner may have as many as are left when it has them, and one whole upload in any case: so
        one alone leaves half of the room to others, two leave a third.

        Raises:
            TooManyUploadsError: all uploads together, or the owner's, have no room for them.
        """
        with self._guard:
            self._row.add_incoming_bytes(owner, num_bytes)
        table = self._row.table
        left_bytes = self._max_incoming_bytes - table.incoming_bytes()
        share_bytes = max(self._max_upload_bytes, left_bytes)
        is_over_share = owner != ANONYMOUS and table.incoming_bytes(owner) > share_bytes
        if left_bytes < 0 or is_over_share:
            self.give_back_incoming(owner, num_bytes)
            raise TooManyUploadsError(
                "the uploads under way take all the room there is for them "
                "(DYCOKE_MAX_INCOMING_BYTES): try again when some have ended"
            )

    def give_back_incoming(self, owner: str, num_bytes: int) -> None:
        with self._guard:
            self._row.add_incoming_bytes(owner, -num_bytes)

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
