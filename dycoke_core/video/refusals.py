"""What clients are told of videos: why one is refused (limits, codecs, what a failed child means),
and what a receipt warns of where one is not as it should be.

The words are ours, with numbers and names that were checked; nothing of a child's reaches a client.
"""

from typing import get_args

from dycoke_core.errors import (
    DycokeError,
    NoVideoStreamError,
    ReadersUnavailableError,
    UnreadableFrameError,
    UnreadableVideoError,
    UnsupportedCodecError,
    VideoLimitError,
    VideoReaderFailedError,
    VideoReaderKilledError,
    VideoReadTimeoutError,
)
from dycoke_core.video.containers import Container
from dycoke_core.video.forked_child import TaskFailure
from dycoke_core.video.frame_list import PictureCodec
from dycoke_core.video.replies import Headers, Placement, Plan
from dycoke_core.video.types import FailureCode, FrameSpec, ReadLimits

PICTURE_CODECS = get_args(PictureCodec)
# `pyav_reader` names their decoders.
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mjpeg")
# decord opens the decoders of all streams, if only to look at them: of these and no others.
DECORD_CODECS = frozenset({*CODECS, "aac", "mp3", "opus", "vorbis"})
KILL_REASONS: tuple[FailureCode, ...] = ("timeout", "memory", "cpu", "crash", "killed")

# How much sooner than the headers say frames may end without a warning: sound often lasts longer.
_TOLERATED_GAP_S = 1.0
_TOLERATED_GAP_SHARE = 0.05

_LOST: dict[FailureCode, str] = {
    "memory": "reading the video takes more memory than a reader may have",
    "cpu": "reading the video takes more CPU time than a reader may have",
    "crash": "a reader of this video crashed",
    "killed": "the readers of this video were killed",
}


def refuse_beyond_limits(headers: Headers, limits: ReadLimits) -> None:
    """Raises a VideoError if the headers show a video that we do not take."""
    probe = headers.probe
    taken = PICTURE_CODECS if probe.container == Container.FRAMES else CODECS
    if probe.codec not in taken:
        raise UnsupportedCodecError(
            f"the video codec {probe.codec} is not one we take ({', '.join(taken)})"
        )
    if probe.width * probe.height == 0:
        raise UnreadableVideoError("the video has no picture size")
    if probe.width * probe.height > limits.max_pixels:
        raise VideoLimitError(
            f"a frame has {probe.width}x{probe.height} pixels; the limit is {limits.max_pixels}"
        )
    if probe.duration_s is not None and probe.duration_s > limits.max_duration_s:
        raise VideoLimitError(
            f"the video lasts {probe.duration_s:.0f} s; the limit is {limits.max_duration_s:.0f} s"
        )
    if probe.num_frames is not None and probe.num_frames > limits.max_source_frames:
        raise _too_many_frames(limits.max_source_frames)
    if headers.extradata_bytes > limits.max_extradata_bytes:
        raise VideoLimitError(
            f"the codec's parameters take {headers.extradata_bytes} bytes; "
            f"the limit is {limits.max_extradata_bytes}"
        )


def as_dycoke_error(failure: TaskFailure, limits: ReadLimits, timeout_s: float) -> DycokeError:
    """Says what a failed task means for the video."""
    if failure.code == "no_process":
        return ReadersUnavailableError("no process can be started to read the video")
    if failure.code == "exception":
        return VideoReaderFailedError("a reader of this video failed")
    if failure.code == "unknown_codec":
        return UnsupportedCodecError(f"the video codec is not one we take ({', '.join(CODECS)})")
    if failure.code == "no_video":
        return NoVideoStreamError("the file has no video stream")
    if failure.code == "too_many_frames":
        return _too_many_frames(limits.max_source_frames)
    if failure.code == "timeout":
        return VideoReadTimeoutError(f"the video could not be read within {timeout_s:.1f} s")
    if failure.code in _LOST:
        return VideoReaderKilledError(_LOST[failure.code])
    return UnreadableVideoError("the video cannot be decoded")


def unreadable_frame(number: int) -> UnreadableFrameError:
    """Args: number: in its list, from 0."""
    return UnreadableFrameError(
        f"frame {number} of the list cannot be decoded, or has too many pixels", number
    )


def warnings_about(plan: Plan, spec: FrameSpec) -> list[str]:
    """What the list of frames shows, before any is decoded."""
    warnings = []
    duration_s = plan.headers.probe.duration_s or 0.0
    if duration_s - plan.end_s > max(_TOLERATED_GAP_S, _TOLERATED_GAP_SHARE * duration_s):
        warnings.append(f"the frames end at {plan.end_s:.2f} s, the file at {duration_s:.2f} s")
    if spec.sampling == "keyframe" and not plan.num_keyframes:
        warnings.append("no keyframes are known of the clip; all its frames were sampled")
    elif spec.sampling == "keyframe" and plan.num_keyframes < spec.num_frames:
        warnings.append(f"the clip has {plan.num_keyframes} keyframes, which are repeated")
    return warnings


def warnings_of(placed: Placement, plan: Plan) -> list[str]:
    num_frames = len(plan.indices)
    num_moved = sum(a != b for a, b in zip(plan.indices, placed.indices, strict=True))
    warnings = []
    if num_moved:
        warnings.append(f"{num_moved} of {num_frames} frames do not decode; neighbours stand in")
    if placed.num_damaged:
        warnings.append(f"{placed.num_damaged} of {num_frames} frames are damaged")
    return warnings


def _too_many_frames(limit: int) -> VideoLimitError:
    return VideoLimitError(f"the video has more than {limit} frames")
