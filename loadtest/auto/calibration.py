"""What a machine can do: measured first, so that rates and objective fit any machine."""

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.auto.profile import Arrival, draw_questions
from loadtest.auto.run import OpenLoop, Outcome
from loadtest.auto.videos import Video

WARM_UP_VIDEOS = 2
IDLE_VIDEOS = 5
_SEED = "calibration"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Of full tokens.

    Args:
        capacity_per_s: answers, while there is always a question waiting.
        idle_ttft_s: of a new video while nothing else runs, median; None: not measured.
        objective_s: a time to first token that is met with room to spare at low load.
    """

    capacity_per_s: float
    idle_ttft_s: float | None
    objective_s: float


def calibrate(
    loop: OpenLoop, videos: Sequence[Video], *, num_questions: int, objective_factor: float
) -> Calibration:
    """Measures a fresh service.

    Args:
        num_questions: asked at once, for the capacity; the service must have room for all.
        objective_factor: times the idle time to first token.

    Raises:
        RuntimeError: a question got no answer.
    """
    warm_up(loop, videos)
    idle = ask_one_by_one(loop, videos, range(WARM_UP_VIDEOS, WARM_UP_VIDEOS + IDLE_VIDEOS))
    asked = itertools.islice(draw_questions(videos, seed=_SEED), num_questions)
    crowd = [Arrival(0.0, 0, -1 - video, scene, question) for video, scene, question in asked]
    ends_s = [_needed(outcome.total_s, outcome) for outcome in loop.run(crowd).outcomes]
    ttfts_s = [_needed(outcome.ttft_s, outcome) for outcome in idle]
    idle_ttft_s = statistics.median(ttfts_s)
    objective_s = round(objective_factor * idle_ttft_s, 2)
    return Calibration(num_questions / max(ends_s), idle_ttft_s, objective_s)


def warm_up(loop: OpenLoop, videos: Sequence[Video]) -> None:
    """First answers are slow, and policy `auto` knows no rates before them.

    Raises:
        RuntimeError: a question got no answer.
    """
    for outcome in ask_one_by_one(loop, videos, range(WARM_UP_VIDEOS)):
        _needed(outcome.total_s, outcome)


def ask_one_by_one(loop: OpenLoop, videos: Sequence[Video], places: range) -> list[Outcome]:
    """Asks the first question about some videos, each when the one before has its answer."""
    outcomes = []
    for place in places:
        scene = place % len(videos)
        video = -1_000_000 - place  # that no list of arrivals has
        arrival = Arrival(0.0, 0, video, scene, videos[scene].questions[0])
        outcomes.append(loop.ask(arrival, time.perf_counter()))
    return outcomes


def _needed(seconds: float | None, outcome: Outcome) -> float:
    if seconds is None:
        why = outcome.refused or outcome.failure
        raise RuntimeError(f"no answer while calibrating: {why}")
    return seconds
