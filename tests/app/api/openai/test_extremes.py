"""Numbers that overflow in other servers: each is refused by its name, or clamped with a warning.

CVE-2025-6242, CVE-2026-24779, CVE-2026-25960 and CVE-2026-105758 are about URLs, frame counts and
rates; the URLs are in `test_fetching`.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from app.api.errors import InvalidFieldsError
from app.api.openai.messages import parse_messages
from app.api.openai.sampling import count_frames, parse_aliases, with_aliases
from app.api.post.frames_by_rate import DEFAULT_FRAMES
from app.messages import FrameRate
from dycoke_core.video import VideoProbe
from tests.cards import model_card

MAX_FRAMES = 128
SAMPLING = ("fps", "num_frames", "max_frames", "max_pixels", "start_s", "end_s")
HUGE = (2**31, 2**63, 2**64, 10**30, 10**400, 1e300, 1.7e308)
WRONG = (-1, -(2**63), -1e300, "1", "32; rm", [], {}, True, False, [1] * 5)


def probe(duration_s: float | None = 10.0, fps: float | None = 25.0) -> VideoProbe:
    return VideoProbe("mp4", "h264", 64, 48, duration_s, 250, fps)


def frames_of(
    part: dict[str, Any],
    aliases: dict[str, Any] | None = None,
    *,
    video: VideoProbe | None = None,
    rate: FrameRate | None = None,
) -> tuple[int, list[str]]:
    """How many frames a body asks for, as the intake finds it."""
    content = [{"type": "video_url", "video_url": {"url": "vid_x", **part}}, "What?"]
    asked = parse_messages([{"role": "user", "content": content}]).video
    assert asked is not None
    options, warnings = parse_aliases({"video": aliases or {}}, aliases)
    asked, more = with_aliases(asked, options, MAX_FRAMES)
    number, most = count_frames(asked, video or probe(), model_card(frame_rate=rate), MAX_FRAMES)
    return number, [*warnings, *more, *most]


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("value", HUGE + WRONG, ids=lambda value: str(value)[:12])
def test_a_part_that_says_too_much_is_refused_or_clamped(name: str, value: Any) -> None:
    try:
        number, _ = frames_of({name: value})
    except InvalidFieldsError as error:
        assert error.problems[0].field.endswith(f".{name}")
        return
    assert value not in WRONG and 1 <= number <= MAX_FRAMES


@pytest.mark.parametrize("name", ["fps", "num_frames"])
@pytest.mark.parametrize("value", HUGE + WRONG, ids=lambda value: str(value)[:12])
def test_an_alias_that_says_too_much_is_clamped_with_a_warning(name: str, value: Any) -> None:
    number, warnings = frames_of({}, {name: value})
    assert 1 <= number <= MAX_FRAMES
    assert any(name in warning for warning in warnings)
    assert all(len(warning) < 200 for warning in warnings)
    if value in WRONG:
        assert number == DEFAULT_FRAMES


@pytest.mark.parametrize(
    ("fps", "number"), [(1e-300, 1), (5e-324, 1), (1e9, MAX_FRAMES), (24.999, MAX_FRAMES)]
)
def test_a_rate_at_the_end_of_its_range_is_counted(fps: float, number: int) -> None:
    assert frames_of({"fps": fps})[0] == number


@settings(deadline=None)
@given(
    fps=st.floats(1e-320, 1e9),
    start_s=st.floats(0, 1e9),
    end_s=st.floats(1e-9, 1e9),
    duration_s=st.none() | st.floats(0, 1e12),
    video_fps=st.none() | st.floats(1e-9, 1e9),
    num_frames=st.none() | st.integers(1, MAX_FRAMES),
    rate=st.none()
    | st.builds(
        FrameRate,
        min_frames=st.integers(1, 8),
        max_frames=st.integers(8, 768),
        multiple=st.integers(1, 4),
    ),
)
def test_the_number_of_frames_is_always_within_bounds(
    fps: float,
    start_s: float,
    end_s: float,
    duration_s: float | None,
    video_fps: float | None,
    num_frames: int | None,
    rate: FrameRate | None,
) -> None:
    part = {"fps": fps, "start_s": start_s, "end_s": end_s, "num_frames": num_frames}
    number, _ = frames_of(part, video=probe(duration_s, video_fps), rate=rate)
    assert 1 <= number <= (num_frames or MAX_FRAMES)


@pytest.mark.parametrize("text", [b'{"fps": 1e999}', b'{"fps": NaN}', b'{"fps": Infinity}'])
def test_numbers_that_json_has_not_are_not_taken_for_rates(text: bytes) -> None:
    try:
        part = from_json(text, allow_inf_nan=False)
    except ValueError:
        return
    with pytest.raises(InvalidFieldsError):
        frames_of(part)
