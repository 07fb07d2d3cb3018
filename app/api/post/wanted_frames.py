"""Which frames of its video a job is about: as its fields ask for them, as its request says it, and
once they are stored.

It remembers what has recently been stored for some frames, so that a job about them can be queued
in the same call that creates it. That call checks that they are still stored.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from app.api.errors import InvalidFieldsError
from app.api.schemas import ChatFields
from app.messages import FrameLimits, FramesRef, FramesWanted, JobRequest, ModelCard
from app.store.frame_store import FramesHeader, frames_digest, max_blob_bytes, parse_header
from app.store.job_queue import ExpectedFrames
from app.video_store import VideoLease
from dycoke_core.model_frames import PixelLimits, frame_size
from dycoke_core.video import FrameSpec

CLIP_TIMES_PER_S = 100
MAX_FOUND = 1024  # a few KB each, at most


@dataclass(frozen=True, slots=True, eq=False)
class WantedFrames:
    """Which frames of which video.

    Args:
        digest: under what they are stored, unless they are the job's own.
    """

    spec: FrameSpec
    video: VideoLease
    digest: str

    @classmethod
    def of(cls, spec: FrameSpec, video: VideoLease, *, cache_salt: str) -> "WantedFrames":
        digest = frames_digest(
            video.video.video_id,
            num_frames=spec.num_frames,
            image_size=spec.image_size,
            start_s=spec.start_s,
            end_s=spec.end_s,
            salt=cache_salt,
            sampling=spec.sampling,
            spread=spec.spread,
            resizing=spec.resizing,
        )
        return cls(spec, video, digest)

    @property
    def video_id(self) -> str:
        return self.video.video.video_id

    @property
    def max_bytes(self) -> int:
        """That their blob takes. Raises: InvalidRequestError."""
        probe = self.video.video.probe
        return max_blob_bytes(self.spec, probe.height, probe.width)


def check_wanted(fields: ChatFields, wanted: WantedFrames, *, max_bytes: int) -> None:
    """Raises InvalidRequestError for what the video does not allow, as far as its headers say.

    Args:
        max_bytes: that the frame store has room for at any time.
    """
    probe = wanted.video.video.probe
    if probe.height and probe.width:
        wanted.spec.shape(probe.height, probe.width)
    end_s = probe.duration_s
    if fields.start_s is not None and end_s is not None and fields.start_s >= end_s:
        raise InvalidFieldsError.of("start_s", f"must be before the video's end at {end_s:.3f} s")
    if wanted.max_bytes > max_bytes:
        message = (
            f"so many frames take more than the {max_bytes} bytes there are for frames "
            "(DYCOKE_MAX_FRAME_STORE_BYTES): take fewer, or smaller ones"
        )
        raise InvalidFieldsError.of("num_frames", message)


def frame_spec(fields: ChatFields, card: ModelCard) -> FrameSpec:
    """Which frames a request is about. Its clip is widened to whole hundredths of a second, so that
    times which differ by less share their frames: the start is rounded down, the end up.
    """
    return FrameSpec(
        num_frames=fields.num_frames,
        image_size=frame_size(
            card.image_size,
            None if card.frame_limits is None else card.frame_limits.limits(),
            fields.num_frames,
            fields.max_pixels,
        ),
        start_s=None if fields.start_s is None else _rounded(fields.start_s, math.floor),
        end_s=None if fields.end_s is None else _rounded(fields.end_s, math.ceil),
        sampling=fields.sampling,
        spread=card.frame_spread,
        resizing=card.frame_resizing,
    )


def wanted_spec(request: JobRequest) -> FrameSpec | None:
    """Which frames a job wants; None if its request does not say."""
    wanted = request.frames_wanted
    if wanted is None:
        return None
    return FrameSpec(
        num_frames=wanted.num_frames,
        image_size=wanted.image_size if wanted.limits is None else wanted.limits.limits(),
        start_s=wanted.start_s,
        end_s=wanted.end_s,
        sampling=wanted.sampling,
        spread=wanted.spread,
        resizing=wanted.resizing,
    )


def frames_wanted(spec: FrameSpec, card: ModelCard, fps: float | None = None) -> FramesWanted:
    """The part of a job's request that `wanted_spec` reads.

    Args:
        fps: the rate by which their number was counted, if any.
    """
    limits = spec.image_size if isinstance(spec.image_size, PixelLimits) else None
    return FramesWanted(
        num_frames=spec.num_frames,
        image_size=card.image_size,
        limits=None if limits is None else FrameLimits(**asdict(limits)),
        start_s=spec.start_s,
        end_s=spec.end_s,
        sampling=spec.sampling,
        spread=spec.spread,
        fps=fps,
        resizing=spec.resizing,
    )


def with_frames(
    request: JobRequest,
    spec: FrameSpec,
    digest: str,
    frames: FramesHeader,
    *,
    is_cached: bool,
    read_s: float = 0.0,
) -> JobRequest:
    """The request of a job with its frames, once they are stored.

    Args:
        is_cached: they were stored already.
        read_s: how long that took, in addition to what the request says.
    """
    shape = frames.shape
    _, height, width, _ = shape
    ref = FramesRef(
        digest=digest,
        num_frames=len(frames.indices),
        image_size=height,
        height=height,
        width=width,
        indices=list(frames.indices),
        timestamps_s=list(frames.timestamps_s),
        reader=frames.reader,
        warnings=list(frames.warnings),
        sampling=spec.sampling,
        start_s=spec.start_s,
        end_s=spec.end_s,
        fps=None if request.frames_wanted is None else request.frames_wanted.fps,
        is_cached=is_cached,
    )
    return request.model_copy(
        update={"frames": ref, "read_frames_s": request.read_frames_s + read_s}
    )


class FoundFrames:
    """Headers of recently stored frames, at most `MAX_FOUND`; the oldest are forgotten."""

    def __init__(self) -> None:
        self._headers: dict[str, bytes] = {}  # by digest, the oldest first

    def note(self, digest: str, header: bytes) -> None:
        """Args: header: the blob's description of its frames, before their pixels."""
        self._headers.pop(digest, None)
        self._headers[digest] = header
        if len(self._headers) > MAX_FOUND:
            del self._headers[next(iter(self._headers))]

    def expected(self, job: JobRequest, spec: FrameSpec, digest: str) -> ExpectedFrames | None:
        """Returns None if nothing is known of these frames."""
        header = self._headers.get(digest)
        if header is None:
            return None
        ready = with_frames(job, spec, digest, parse_header(header), is_cached=True)
        return ExpectedFrames(header, ready)


def _rounded(time_s: float, to_whole: Callable[[float], int]) -> float:
    hundredths = round(time_s * CLIP_TIMES_PER_S, 6)  # 1.15 is a little less than 115 hundredths
    if not math.isfinite(hundredths):
        return time_s  # beyond any video
    return to_whole(hundredths) / CLIP_TIMES_PER_S
