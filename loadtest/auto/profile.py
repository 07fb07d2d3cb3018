"""The load: when questions arrive, and what each asks.

An open loop: arrivals come at random moments (Poisson), whether or not earlier ones have been
answered. Their rate is a share of what full tokens were measured to manage, and steps from phase to
phase through under- and overload. One seed gives one list of arrivals, which every setting gets.
"""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dycoke_core.tiny.questions import Question
from loadtest.auto.videos import Video

NEW_SHARE = 1 / 3  # of questions are about a new video, the others about one of the latest
NUM_LATEST = 8
LOW_SHARE = 0.5
BURST_S = 1.0  # within which a burst arrives


@dataclass(frozen=True, slots=True)
class Phase:
    """Args:
    share: of the capacity: the mean rate of arrivals.
    burst_s: in addition, as many at its start as the capacity serves in this many seconds.
    """

    name: str
    share: float
    burst_s: float = 0.0

    @property
    def is_low(self) -> bool:
        """Whether full tokens would manage it with time to spare, if nothing were left over from
        before."""
        return self.share <= LOW_SHARE and not self.burst_s


PHASES = (
    Phase("half load", 0.5),
    Phase("full load", 1.0),
    Phase("overload", 1.5),
    Phase("rest", 0.5),
    Phase("far overload", 2.5),
    Phase("rest after it", 0.5),
    Phase("burst", 0.5, burst_s=5.0),
    Phase("rest after burst", 0.5),
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One question.

    Args:
        at_s: since the start of the profile.
        phase: its place among the phases.
        video: counts the videos of a list of arrivals; questions of one number are about one file.
        scene: what the video shows, a place among the videos that were made.
    """

    at_s: float
    phase: int
    video: int
    scene: int
    question: Question


def plan_arrivals(
    phases: Sequence[Phase],
    videos: Sequence[Video],
    *,
    phase_s: float,
    capacity_per_s: float,
    seed: int,
) -> list[Arrival]:
    """Draws a profile's arrivals, in the order of their times.

    Args:
        phase_s: how long each phase is.
    """
    chance = random.Random(f"{seed}-times")
    times = [
        (place * phase_s + at_s, place)
        for place, phase in enumerate(phases)
        for at_s in sorted(_times(phase, phase_s, capacity_per_s, chance))
    ]
    asked = draw_questions(videos, seed=seed)
    return [Arrival(at_s, place, *next(asked)) for at_s, place in times]


def draw_questions(
    videos: Sequence[Video], *, seed: int | str
) -> Iterator[tuple[int, int, Question]]:
    """Yields what a crowd asks, without end: the video's number, its scene, the question.

    Most questions are about a video that others have just asked about, as when many watch the same.
    """
    chance = random.Random(f"{seed}-questions")
    latest: deque[tuple[int, int]] = deque(maxlen=NUM_LATEST)
    scenes = chance.sample(range(len(videos)), len(videos))
    num_videos = 0
    while True:
        if not latest or chance.random() < NEW_SHARE:
            latest.append((num_videos, scenes[num_videos % len(scenes)]))
            num_videos += 1
            video, scene = latest[-1]
        else:
            video, scene = chance.choice(latest)
        yield video, scene, chance.choice(videos[scene].questions)


def _times(
    phase: Phase, phase_s: float, capacity_per_s: float, chance: random.Random
) -> Iterator[float]:
    """Seconds since the phase's start, in no order."""
    for _ in range(round(phase.burst_s * capacity_per_s)):
        yield chance.uniform(0.0, min(BURST_S, phase_s))
    rate = phase.share * capacity_per_s
    at_s = chance.expovariate(rate)
    while at_s < phase_s:
        yield at_s
        at_s += chance.expovariate(rate)
