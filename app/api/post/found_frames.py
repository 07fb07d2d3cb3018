"""What lately was stored of the frames that jobs are about: so that a job can be queued in the same
call that creates it, if the same is stored still, which that call checks.
"""

from app.api.post.job_request import with_frames
from app.messages import JobRequest
from app.store.frame_store import parse_header
from app.store.job_queue import ExpectedFrames
from dycoke_core.video import FrameSpec

MAX_FOUND = 1024  # of a few KB each, at most


class FoundFrames:
    def __init__(self) -> None:
        self._headers: dict[str, bytes] = {}  # by digest, the oldest first

    def note(self, digest: str, header: bytes) -> None:
        """Args:
        header: what the blob says of its frames, before their pixels.
        """
        self._headers.pop(digest, None)
        self._headers[digest] = header
        if len(self._headers) > MAX_FOUND:
            del self._headers[next(iter(self._headers))]

    def expected(self, job: JobRequest, spec: FrameSpec, digest: str) -> ExpectedFrames | None:
        """None where nothing is known of these frames."""
        header = self._headers.get(digest)
        if header is None:
            return None
        ready = with_frames(job, spec, digest, parse_header(header), is_cached=True)
        return ExpectedFrames(header, ready)
