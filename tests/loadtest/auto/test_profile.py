"""What the load looks like, and that every setting gets the same."""

import itertools
from collections import Counter

import pytest

from loadtest.auto.profile import (
    BURST_S,
    NEW_SHARE,
    PHASES,
    Arrival,
    Phase,
    draw_questions,
    plan_arrivals,
)
from tests.loadtest.auto.canned import VIDEOS


def plan(
    seed: int = 1, *, phases: tuple[Phase, ...] = PHASES, phase_s: float = 10.0, rate: float = 8.0
) -> list[Arrival]:
    return plan_arrivals(phases, VIDEOS, phase_s=phase_s, capacity_per_s=rate, seed=seed)


def test_one_seed_gives_one_list_of_arrivals() -> None:
    assert plan(1) == plan(1)
    assert plan(1) != plan(2)


def test_arrivals_come_in_the_order_of_their_times_and_within_their_phases() -> None:
    arrivals = plan(phase_s=3.0)
    times = [arrival.at_s for arrival in arrivals]
    assert times == sorted(times)
    for arrival in arrivals:
        assert arrival.phase * 3.0 <= arrival.at_s < (arrival.phase + 1) * 3.0


def test_each_phase_has_its_share_of_the_capacity_and_bursts_come_at_once() -> None:
    arrivals = plan(phase_s=400.0)
    counts = Counter(arrival.phase for arrival in arrivals)
    for place, phase in enumerate(PHASES):
        expected = phase.share * 8.0 * 400.0 + phase.burst_s * 8.0
        assert counts[place] == pytest.approx(expected, rel=0.1), phase.name
    (place,) = (place for place, phase in enumerate(PHASES) if phase.burst_s)
    in_burst = [a for a in arrivals if a.phase == place and a.at_s % 400.0 <= BURST_S]
    assert len(in_burst) >= PHASES[place].burst_s * 8.0


def test_profile_goes_from_half_load_to_far_overload_and_back() -> None:
    shares = [phase.share for phase in PHASES]
    assert shares[0] == shares[-1] == 0.5 and max(shares) == 2.5
    assert {0.5, 1.0, 1.5, 2.5} == set(shares)
    names = [phase.name for phase in PHASES]
    assert len(set(names)) == len(names), "tables go by the names"


def test_most_questions_are_about_a_video_that_was_just_asked_about() -> None:
    asked = list(itertools.islice(draw_questions(VIDEOS, seed=3), 4000))
    num_videos = len({video for video, _, _ in asked})
    assert num_videos == pytest.approx(4000 * NEW_SHARE, rel=0.1)
    by_video = {video: scene for video, scene, _ in asked}
    assert all(by_video[video] == scene for video, scene, _ in asked), "a video shows one scene"
    assert set(by_video.values()) == set(range(len(VIDEOS)))
    for _, scene, question in asked:
        assert question in VIDEOS[scene].questions
