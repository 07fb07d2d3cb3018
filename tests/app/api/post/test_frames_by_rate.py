"""Frames by a rate, against the rules of Qwen's processors; other models are unchanged."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.post.frames_by_rate import count_by_rate
from app.messages import FrameRate
from dycoke_core.video import VideoProbe
from tests.cards import model_card
from tests.qwen_sampling import sample_qwen2_vl, sample_qwen3_vl

RULES = {
    "qwen2_5_vl": (FrameRate(min_frames=4, max_frames=768, multiple=2), sample_qwen2_vl),
    "qwen3_vl": (FrameRate(min_frames=4, max_frames=768, multiple=1), sample_qwen3_vl),
}
FILM = 24000 / 1001


def counted(
    total: int, video_fps: float, fps: float, rate: FrameRate | None, most: int = 768
) -> int:
    probe = VideoProbe("mp4", "h264", 64, 48, total / video_fps, total, video_fps)
    card = model_card(frame_rate=rate)
    num_frames, _ = count_by_rate(fps, probe, card, clip=(None, None), num_frames=None, most=most)
    return num_frames


@pytest.mark.parametrize("family", RULES)
@settings(deadline=None)
@given(
    total=st.integers(2, 30_000),
    video_fps=st.sampled_from([FILM, 24.0, 25.0, 30000 / 1001, 30.0, 50.0, 60.0, 12.5]),
    fps=st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 7.5]) | st.floats(0.01, 12.5),
    most=st.sampled_from([768, 128, 33, 4]),
)
def test_a_rate_makes_as_many_frames_as_the_models_processor_takes(
    family: str, total: int, video_fps: float, fps: float, most: int
) -> None:
    """Its own maximum is the server's, where that is less."""
    rate, sample = RULES[family]
    expected = len(sample(total, fps=fps, video_fps=video_fps, max_frames=most))
    if family == "qwen2_5_vl":  # its steps in float32 may come to one index more
        length = min(max(total / video_fps * fps, 4), most // 2 * 2, total // 2 * 2)
        assert expected - 1 <= 2 * math.floor(length / 2) <= expected
        expected = 2 * math.floor(length / 2)
    assert counted(total, video_fps, fps, rate, most) == expected


@pytest.mark.parametrize(
    ("seconds", "qwen2_5", "qwen3", "llava"),
    [(0.04, 1, 1, 1), (1.0, 4, 4, 2), (1.52, 4, 4, 3), (7.6, 14, 15, 15), (15.52, 30, 31, 31)],
)
def test_two_frames_a_second(seconds: float, qwen2_5: int, qwen3: int, llava: int) -> None:
    total = round(25 * seconds)
    of = [RULES["qwen2_5_vl"][0], RULES["qwen3_vl"][0], None]
    assert [counted(total, 25.0, 2.0, rate) for rate in of] == [qwen2_5, qwen3, llava]


def test_fewer_than_a_clip_needs_are_told() -> None:
    probe = VideoProbe("mp4", "h264", 64, 48, 10.0, 250, 25.0)
    card = model_card(frame_rate=RULES["qwen2_5_vl"][0])
    taken = count_by_rate(2.0, probe, card, clip=(None, None), num_frames=None, most=7)
    assert taken == (6, ["fps 2: 20 frames wanted, 7 are the most"])
    clip = count_by_rate(2.0, probe, card, clip=(1.0, 5.5), num_frames=None, most=128)
    assert clip == (8, [])
    tiny = count_by_rate(2.0, probe, card, clip=(1.0, 1.04), num_frames=None, most=128)
    assert tiny == (1, []), "a clip of one frame"


def test_a_video_that_does_not_say_how_long_it_is_gives_a_number() -> None:
    probe = VideoProbe("webm", "vp9", 64, 48, None, None, None)
    num_frames, warnings = count_by_rate(
        2.0, probe, model_card(), clip=(None, None), num_frames=None, most=128
    )
    assert num_frames == 32 and "does not say how long" in warnings[0]


@pytest.mark.parametrize("total", [54, 107, 240])
def test_a_rate_above_the_videos_own_takes_every_frame(total: int) -> None:
    qwen2_5, qwen3 = (counted(total, FILM, 30.0, RULES[family][0]) for family in RULES)
    assert (qwen2_5, qwen3) == (total // 2 * 2, total)
    probe = VideoProbe("mp4", "h264", 64, 48, total / FILM, total, FILM)
    card = model_card(frame_rate=RULES["qwen3_vl"][0])
    _, warnings = count_by_rate(30.0, probe, card, clip=(None, None), num_frames=None, most=768)
    assert warnings == ["fps 30: the video has 23.976"]


@pytest.mark.parametrize("clip", [(None, None), (0.0, None), (None, 10.0), (0.0, 60.0)])
@pytest.mark.parametrize("family", [*RULES, None])
def test_frames_that_an_edit_list_hides_are_not_counted(
    family: str | None, clip: tuple[float | None, float | None]
) -> None:
    """Headers list 14 s of frames; 10 s of them are shown."""
    probe = VideoProbe("mp4", "h264", 64, 48, 10.0, 350, 25.0)
    card = model_card(frame_rate=None if family is None else RULES[family][0])
    for fps, expected in ((2.0, 20), (25.0, 250)):
        taken = count_by_rate(fps, probe, card, clip=clip, num_frames=None, most=768)
        assert taken == (expected, [])


def test_without_a_rule_it_is_the_length_that_counts() -> None:
    """Headers whose frames last longer than the clip."""
    probe = VideoProbe("mp4", "h264", 64, 48, 9.99, 250, 25.0)
    taken = count_by_rate(2.0, probe, model_card(), clip=(None, None), num_frames=None, most=768)
    assert taken == (19, [])


@pytest.mark.parametrize("duration_s", [10.0, 9.9997, 10.0004])
@pytest.mark.parametrize("family", RULES)
def test_headers_without_a_number_of_frames_give_it_by_length_and_rate(
    family: str, duration_s: float
) -> None:
    """As those of Matroska, whose times are whole milliseconds."""
    rate, sample = RULES[family]
    probe = VideoProbe("mkv", "h264", 64, 48, duration_s, None, 24.0)
    card = model_card(frame_rate=rate)
    taken, _ = count_by_rate(2.0, probe, card, clip=(None, None), num_frames=None, most=768)
    assert taken == len(sample(240, fps=2.0, video_fps=24.0)) == 20


@pytest.mark.parametrize("clip", [(None, None), (1.0, 2.0)])
@pytest.mark.parametrize(("fps", "expected"), [(2.0, 4), (30.0, 30)])
def test_the_least_number_is_kept_where_a_videos_rate_is_unknown(
    fps: float, expected: int, clip: tuple[float | None, float | None]
) -> None:
    probe = VideoProbe("webm", "vp9", 64, 48, clip[1] or 1.0, None, None)
    for family, (rate, _) in RULES.items():
        taken = count_by_rate(
            fps, probe, model_card(frame_rate=rate), clip=clip, num_frames=None, most=768
        )
        assert taken == (expected, []), family
