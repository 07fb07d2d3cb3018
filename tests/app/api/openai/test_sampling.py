"""How many frames a conversation's video gives: by its part, by aliases, within our limits."""

from typing import Any

import pytest

from app.api.errors import InvalidFieldsError
from app.api.openai.messages import VideoPart
from app.api.openai.sampling import (
    Aliases,
    count_frames,
    limit_pixels,
    parse_aliases,
    with_aliases,
)
from app.api.post.frames_by_rate import DEFAULT_FRAMES
from app.messages import FrameLimits
from dycoke_core.video import Container, VideoProbe
from tests.cards import model_card

MAX_FRAMES = 64
PROBE = VideoProbe("mp4", "h264", 64, 48, 10.0, 250, 25.0)


def part(**said: Any) -> VideoPart:
    return VideoPart(source="vid_1", turn=0, param="p", **said)


def test_aliases_are_read_from_both_places_and_the_later_one_is_taken() -> None:
    aliases, warnings = parse_aliases(
        {"video": {"fps": 2, "num_frames": None}}, {"fps": 1.0, "max_pixels": 5000}
    )
    assert aliases == Aliases(fps=2.0, max_pixels=5000)
    assert warnings == ["mm_processor_kwargs.fps: media_io_kwargs.video.fps is taken"]


def test_the_same_alias_twice_is_no_contradiction() -> None:
    assert parse_aliases({"video": {"num_frames": 8}}, {"num_frames": 8}) == (
        Aliases(num_frames=8),
        [],
    )
    assert parse_aliases(None, None) == (Aliases(), [])


def test_what_is_not_honoured_is_told_by_its_place() -> None:
    aliases, warnings = parse_aliases(
        {"video": {"fps": 0, "num_frames": 1.5, "codec": "x"}, "image": {}},
        {"do_sample_frames": False, "max_pixels": -1},
    )
    assert aliases == Aliases()
    assert [warning.partition(":")[0] for warning in warnings] == [
        "media_io_kwargs.image",
        "mm_processor_kwargs.do_sample_frames",
        "mm_processor_kwargs.max_pixels",
        "media_io_kwargs.video.fps",
        "media_io_kwargs.video.num_frames",
        "media_io_kwargs.video.codec",
    ]
    with pytest.raises(InvalidFieldsError, match=r"media_io_kwargs\.video"):
        parse_aliases({"video": [1]}, None)


def test_an_alias_says_what_the_part_leaves_open() -> None:
    aliases = Aliases(fps=2.0, num_frames=8, max_pixels=5000)
    filled, warnings = with_aliases(part(), aliases, MAX_FRAMES)
    assert (filled.fps, filled.num_frames, filled.max_pixels) == (2.0, 8, 5000)
    assert not warnings


def test_the_part_goes_before_aliases_which_are_told() -> None:
    aliases = Aliases(fps=2.0, num_frames=8, max_pixels=5000)
    own, warnings = with_aliases(part(fps=1.0, max_pixels=100), aliases, MAX_FRAMES)
    assert (own.fps, own.num_frames, own.max_pixels) == (1.0, None, 100)
    assert [warning.partition(":")[0] for warning in warnings] == [
        "fps 2",
        "num_frames 8",
        "max_pixels 5000",
    ]


def test_an_alias_is_clamped_and_a_part_refused() -> None:
    clamped, warnings = with_aliases(part(), Aliases(num_frames=1000), MAX_FRAMES)
    assert clamped.num_frames == MAX_FRAMES
    assert warnings == ["num_frames 1000: 64 are the most"]
    with pytest.raises(InvalidFieldsError) as caught:
        with_aliases(part(num_frames=MAX_FRAMES + 1), Aliases(), MAX_FRAMES)
    assert caught.value.problems[0].field == "p.num_frames"


def test_pixels_have_a_ceiling_and_need_a_model_that_takes_any_size() -> None:
    square = model_card()
    free = model_card(frame_limits=FrameLimits(multiple=28, min_pixels=1, max_pixels=10**6))
    assert limit_pixels(part(), free, 10_000) == (None, [])
    assert limit_pixels(part(max_pixels=9000), free, 10_000) == (9000, [])
    clamped, (warning,) = limit_pixels(part(max_pixels=20_000), free, 10_000)
    assert clamped == 10_000 and warning == "max_pixels 20000: 10000 are the most"
    ignored, (warning,) = limit_pixels(part(max_pixels=9000), square, 10_000)
    assert ignored is None and "one size" in warning


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ({}, DEFAULT_FRAMES),
        ({"num_frames": 8}, 8),
        ({"max_frames": 4}, 4),
        ({"num_frames": 8, "max_frames": 4}, 4),
        ({"max_frames": 1000}, DEFAULT_FRAMES),
        ({"fps": 1.0}, 10),
        ({"fps": 1.0, "num_frames": 4}, 4),
        ({"fps": 1.0, "start_s": 5.0}, 5),
    ],
)
def test_a_video_gives_as_many_frames_as_its_part_wants(said: dict[str, Any], number: int) -> None:
    counted, _ = count_frames(part(**said), PROBE, model_card(), MAX_FRAMES)
    assert counted == number


@pytest.mark.parametrize(
    ("given", "said", "number", "warning"),
    [
        (8, {}, 8, "8 frames were given, and all are used"),
        (8, {"num_frames": 8}, 8, None),
        (8, {"num_frames": 3}, 3, "8 frames were given: 3 of them are used"),
        (8, {"num_frames": 8, "start_s": 1.0, "end_s": 2.0}, 2, "2 frames were given"),
        (100, {"num_frames": 80}, MAX_FRAMES, "100 frames were given: 64 of them are used"),
    ],
)
def test_no_frame_of_a_list_is_used_twice(
    given: int, said: dict[str, Any], number: int, warning: str | None
) -> None:
    fps = 2.0
    probe = VideoProbe(Container.FRAMES, "mjpeg", 64, 48, given / fps, given, fps)
    counted, warnings = count_frames(part(**said), probe, model_card(), MAX_FRAMES)
    assert counted == number
    assert len(warnings) == (warning is not None)
    assert warning is None or warning in warnings[0]
