"""Which videos are refused, and with which words."""

from dataclasses import replace

import pytest

from dycoke_core.errors import (
    NoVideoStreamError,
    ReadersUnavailableError,
    UnreadableVideoError,
    UnsupportedCodecError,
    VideoError,
    VideoLimitError,
    VideoReaderFailedError,
    VideoReaderKilledError,
    VideoReadTimeoutError,
)
from dycoke_core.video import ReadLimits, VideoProbe
from dycoke_core.video.forked_child import TaskFailure
from dycoke_core.video.refusals import (
    CODECS,
    KILL_REASONS,
    as_dycoke_error,
    refuse_beyond_limits,
)
from dycoke_core.video.replies import Headers
from dycoke_core.video.types import FailureCode

LIMITS = ReadLimits(max_pixels=320 * 240, max_duration_s=60, max_source_frames=1500)
PROBE = VideoProbe("mp4", "h264", 320, 240, 60.0, 1500, 25.0)


def headers(extradata_bytes: int = 40, **probe: object) -> Headers:
    return Headers(replace(PROBE, **probe), extradata_bytes, frozenset({"h264"}))  # type: ignore[arg-type]


def test_a_video_at_every_limit_is_taken() -> None:
    for codec in CODECS:
        refuse_beyond_limits(headers(LIMITS.max_extradata_bytes, codec=codec), LIMITS)
    refuse_beyond_limits(headers(duration_s=None, num_frames=None), LIMITS)
    refuse_beyond_limits(headers(container="frames", codec="png"), LIMITS)


@pytest.mark.parametrize(
    ("shown", "error", "words"),
    [
        (headers(codec="prores"), UnsupportedCodecError, "prores is not one we take"),
        (headers(codec="png"), UnsupportedCodecError, "png is not one we take"),
        (headers(container="frames"), UnsupportedCodecError, "h264 is not one we take"),
        (headers(width=0), UnreadableVideoError, "no picture size"),
        (headers(width=321), VideoLimitError, "321x240 pixels; the limit is 76800"),
        (headers(duration_s=60.6), VideoLimitError, "lasts 61 s; the limit is 60 s"),
        (headers(num_frames=1501), VideoLimitError, "more than 1500 frames"),
        (headers(2**20 + 1), VideoLimitError, "1048577 bytes; the limit is 1048576"),
    ],
)
def test_a_video_beyond_a_limit_is_refused_with_the_limit(
    shown: Headers, error: type[VideoError], words: str
) -> None:
    with pytest.raises(error, match=words):
        refuse_beyond_limits(shown, LIMITS)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("no_process", ReadersUnavailableError),
        ("exception", VideoReaderFailedError),
        ("unknown_codec", UnsupportedCodecError),
        ("no_video", NoVideoStreamError),
        ("too_many_frames", VideoLimitError),
        ("timeout", VideoReadTimeoutError),
        ("unreadable", UnreadableVideoError),
        *((code, VideoReaderKilledError) for code in KILL_REASONS if code != "timeout"),
    ],
)
def test_a_failed_child_is_told_in_our_words(code: FailureCode, error: type[Exception]) -> None:
    told = as_dycoke_error(TaskFailure(code, "/secret/path"), LIMITS, timeout_s=2.5)
    assert type(told) is error
    assert "secret" not in told.message
