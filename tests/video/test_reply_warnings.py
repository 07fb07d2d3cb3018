"""What a receipt warns of, from the children's replies about a video."""

from dataclasses import replace

import pytest

from dycoke_core.video import FrameSpec, VideoProbe
from dycoke_core.video.replies import Headers, Placement, Plan

PROBE = VideoProbe("mp4", "h264", 320, 240, 60.0, 1500, 25.0)


def headers(extradata_bytes: int = 40, **probe: object) -> Headers:
    return Headers(replace(PROBE, **probe), extradata_bytes, frozenset({"h264"}))  # type: ignore[arg-type]


def plan(**fields: object) -> Plan:
    usual = Plan(
        headers(),
        total_frames=1500,
        has_times=True,
        end_s=60.0,
        shown_s=60.0,
        indices=(0, 700, 1499),
        timestamps_s=(0.0, 28.0, 59.96),
        num_keyframes=0,
        key_pts=(),
        upright_size=(240, 320),
    )
    return replace(usual, **fields)  # type: ignore[arg-type]


def test_frames_that_end_long_before_the_file_are_warned_of() -> None:
    spec = FrameSpec(num_frames=3, image_size=112)
    assert plan(end_s=57.0).warnings(spec) == []  # sound may last a twentieth longer
    (warning,) = plan(end_s=56.9).warnings(spec)
    assert warning == "the frames end at 56.90 s, the file at 60.00 s"
    assert plan(headers=headers(duration_s=None)).warnings(spec) == []


@pytest.mark.parametrize(("num_keyframes", "words"), [(0, "no keyframes"), (2, "2 keyframes")])
def test_too_few_keyframes_are_warned_of(num_keyframes: int, words: str) -> None:
    spec = FrameSpec(num_frames=3, image_size=112, sampling="keyframe")
    (warning,) = plan(num_keyframes=num_keyframes).warnings(spec)
    assert words in warning
    assert plan(num_keyframes=3).warnings(spec) == []


def test_neighbours_that_stand_in_and_damaged_frames_are_counted() -> None:
    times = (0.0, 28.0, 59.96)
    assert Placement((0, 700, 1499), times, 0).warnings(plan()) == []
    assert Placement((0, 701, 1498), times, 1).warnings(plan()) == [
        "2 of 3 frames do not decode; neighbours stand in",
        "1 of 3 frames are damaged",
    ]
