"""What a machine can do, by the figures of a loop that answers by the script."""

from collections.abc import Sequence
from typing import cast

import pytest

from loadtest.auto.calibration import (
    IDLE_VIDEOS,
    WARM_UP_VIDEOS,
    ask_one_by_one,
    calibrate,
    warm_up,
)
from loadtest.auto.profile import Arrival
from loadtest.auto.run import OpenLoop, Outcome, RunResult
from tests.loadtest.auto.canned import VIDEOS


class Loop:
    """Answers each question after so long; a crowd's answers end one after another."""

    def __init__(self, ttfts_s: Sequence[float | None], total_s: float = 0.5) -> None:
        self.asked: list[Arrival] = []
        self.crowd: Sequence[Arrival] = ()
        self._ttfts_s = list(ttfts_s)
        self._total_s = total_s

    def ask(self, arrival: Arrival, due_at_s: float) -> Outcome:
        self.asked.append(arrival)
        ttft_s = self._ttfts_s[(len(self.asked) - 1) % len(self._ttfts_s)]
        if ttft_s is None:
            return Outcome(arrival, refused="queue_full")
        return Outcome(arrival, ttft_s, ttft_s + 1.0)

    def run(self, arrivals: Sequence[Arrival]) -> RunResult:
        self.crowd = arrivals
        outcomes = [
            Outcome(arrival, self._total_s * place, self._total_s * place)
            for place, arrival in enumerate(arrivals, start=1)
        ]
        return RunResult(outcomes, max_stall_s=0.0)


def as_loop(loop: Loop) -> OpenLoop:
    return cast(OpenLoop, loop)


def test_capacity_is_answers_by_the_time_of_the_last_and_the_objective_by_the_median() -> None:
    ttfts_s = [9.0] * WARM_UP_VIDEOS + [0.3, 0.1, 0.2, 0.5, 0.4]
    loop = Loop(ttfts_s)
    found = calibrate(as_loop(loop), VIDEOS, num_questions=8, objective_factor=3.0)
    assert found.capacity_per_s == pytest.approx(8 / (8 * 0.5))
    assert found.idle_ttft_s == 0.3, "the first answers, which are slow, do not count"
    assert found.objective_s == 0.9
    assert len(loop.crowd) == 8 and all(arrival.at_s == 0.0 for arrival in loop.crowd)


def test_every_video_that_is_asked_about_alone_is_new() -> None:
    loop = Loop([0.1])
    calibrate(as_loop(loop), VIDEOS, num_questions=4, objective_factor=3.0)
    videos = [arrival.video for arrival in loop.asked]
    assert len(set(videos)) == len(videos) == WARM_UP_VIDEOS + IDLE_VIDEOS
    assert not set(videos) & {arrival.video for arrival in loop.crowd}


def test_who_gets_no_answer_while_calibrating_is_told_why() -> None:
    for loop in (Loop([None]), Loop([0.1] * WARM_UP_VIDEOS + [None])):
        with pytest.raises(RuntimeError, match="queue_full"):
            calibrate(as_loop(loop), VIDEOS, num_questions=4, objective_factor=3.0)
    with pytest.raises(RuntimeError, match="no answer while calibrating"):
        warm_up(as_loop(Loop([None])), VIDEOS)


def test_questions_go_round_the_scenes() -> None:
    loop = Loop([0.1])
    outcomes = ask_one_by_one(as_loop(loop), VIDEOS, range(2, 2 + len(VIDEOS)))
    scenes = [outcome.arrival.scene for outcome in outcomes]
    assert sorted(scenes) == list(range(len(VIDEOS))) and scenes[0] == 2
