"""Arrivals and outcomes without a service."""

from dataclasses import replace

from dycoke_core.tiny.questions import Question
from loadtest.auto.profile import Arrival, Phase
from loadtest.auto.run import Choice, Outcome
from loadtest.auto.videos import Video

PHASES = (Phase("low", 0.5), Phase("high", 2.0, burst_s=2.0))
PHASE_S = 10.0
OBJECTIVE_S = 1.0
QUESTION = Question("color", "What color is the circle?", "It is red.")
VIDEOS = [Video(f"scene {n}".encode(), (QUESTION,) * (n + 1)) for n in range(4)]


def answered(
    at_s: float,
    ttft_s: float,
    *,
    is_right: bool | None = True,
    compression: str = "full",
    choice: Choice | None = None,
) -> Outcome:
    """The outcome of a question that was due at a time of the profile."""
    arrival = Arrival(at_s, int(at_s / PHASE_S), video=0, scene=0, question=QUESTION)
    return Outcome(arrival, ttft_s, ttft_s + 0.5, is_right, compression, choice)


def chosen(outcome: Outcome, level: int, reason: str = "objective") -> Outcome:
    """The same by a choice of policy `auto`, which predicted half a second too much."""
    assert outcome.ttft_s is not None
    choice = Choice(level, reason, outcome.ttft_s + 0.5, outcome.ttft_s)
    name = "full" if level == 0 else "dycoke k=0.9"
    return replace(outcome, compression=name, choice=choice)


def refused(at_s: float) -> Outcome:
    return Outcome(answered(at_s, 0.0).arrival, refused="queue_full")


def failed(at_s: float) -> Outcome:
    return Outcome(answered(at_s, 0.0).arrival, failure="the stream broke")
