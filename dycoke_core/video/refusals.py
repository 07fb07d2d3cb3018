"""Why a video is refused: limits, codecs, and what a failed child means.

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
from dycoke_core.video.replies import Headers
from dycoke_core.video.types import FailureCode, ReadLimits

PICTURE_CODECS = get_args(PictureCodec)
# `pyav_reader` names their decoders.
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mjpeg")
# decord opens the decoders of all streams, if only to look at them: of these and no others.
DECORD_CODECS = frozenset({*CODECS, "aac", "mp3", "opus", "vorbis"})
KILL_REASONS: tuple[FailureCode, ...] = ("timeout", "memory", "cpu", "crash", "killed")

_LOST: dict[FailureCode, str] = {
    "memory": "reading the video takes more memory than a reader may have: encode it with smaller "
    "frames",
    "cpu": "reading the video takes more CPU time than a reader may have: take a shorter part of "
    "it, or encode it with smaller frames",
    "crash": "a reader of this video crashed: encode it again, as H.264 in MP4",
    "killed": "the readers of this video were killed: encode it again, as H.264 in MP4",
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
        raise UnreadableVideoError(
            "the video has no picture size: encode it again, as H.264 in MP4"
        )
    if probe.width * probe.height > limits.max_pixels:
        raise VideoLimitError(
            f"a frame has {probe.width}x{probe.height} pixels; "
            f"the limit is {limits.max_pixels} pixels"
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
            f"the limit is {limits.max_extradata_bytes} bytes"
        )


def as_dycoke_error(failure: TaskFailure, limits: ReadLimits, timeout_s: float) -> DycokeError:
    """Says what a failed task means for the video."""
    if failure.code == "no_process":
        return ReadersUnavailableError("no process can be started to read the video: try again")
    if failure.code == "exception":
        return VideoReaderFailedError(
            "a reader of this video failed: encode it again, as H.264 in MP4"
        )
    if failure.code == "unknown_codec":
        return UnsupportedCodecError(f"the video codec is not one we take ({', '.join(CODECS)})")
    if failure.code == "no_video":
        return NoVideoStreamError("the file has no video stream")
    if failure.code == "too_many_frames":
        return _too_many_frames(limits.max_source_frames)
    if failure.code == "timeout":
        return VideoReadTimeoutError(
            f"the video could not be read within {timeout_s:.1f} s: take a shorter part of it, or "
            "encode it with smaller frames"
        )
    if failure.code in _LOST:
        return VideoReaderKilledError(_LOST[failure.code], failure.code)
    return UnreadableVideoError("the video cannot be decoded: encode it again, as H.264 in MP4")


def unreadable_frame(number: int) -> UnreadableFrameError:
    """Args: number: in its list, from 0."""
    return UnreadableFrameError(
        f"frame {number} of the list cannot be decoded, or has too many pixels", number
    )


def _too_many_frames(limit: int) -> VideoLimitError:
    return VideoLimitError(f"the video has more than {limit} frames, which is the limit: cut it")
