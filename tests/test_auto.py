"""The rule of policy `auto`: by itself, and over simulated loads in virtual time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dycoke_core import auto
from dycoke_core.auto import (
    DEFAULT_LADDER,
    AutoConfig,
    Choice,
    Chooser,
    Level,
    Rates,
    Reason,
    Work,
    is_auto,
    resolved_compression,
)
from dycoke_core.errors import InvalidRequestError

RETAINED = (1.0, 0.62, 0.47, 0.32)  # of DEFAULT_LADDER at 32 frames
DEFAULT = AutoConfig(objective_s=2.0)


def levels(*seconds: float, cached: tuple[int, ...] = ()) -> dict[int, Level]:
    return {
        place: Level(DEFAULT_LADDER[place], RETAINED[place], place in cached, predicted_s)
        for place, predicted_s in enumerate(seconds)
    }


# --- configuration ---


@pytest.mark.parametrize(
    ("value", "is_one"),
    [
        ("auto", True),
        ({"policy": "auto"}, True),
        ("dycoke", False),
        ({"k": 0.5}, False),
        (None, False),
    ],
)
def test_the_policy_is_recognised(value: object, is_one: bool) -> None:
    assert is_auto(value) is is_one


def test_what_a_request_leaves_out_is_the_default_s() -> None:
    default = AutoConfig(objective_s=3.0, at_least=0.2, ladder=DEFAULT_LADDER[:2])
    assert AutoConfig.parse({"policy": "auto"}, default) == default
    asked = AutoConfig.parse({"policy": "auto", "objective_s": 1, "at_least": 0.5}, default)
    assert (asked.objective_s, asked.at_least, asked.ladder) == (1.0, 0.5, default.ladder)


def test_the_wire_keeps_everything() -> None:
    config = AutoConfig(objective_s=0.5, at_least=0.3, ladder=DEFAULT_LADDER[1:])
    assert resolved_compression(config.as_dict()) == config
    assert resolved_compression(DEFAULT_LADDER[1].as_dict()) == DEFAULT_LADDER[1]


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ({"objective_s": 0}, "objective_s"),
        ({"objective_s": float("nan")}, "objective_s"),
        ({"objective_s": True}, "objective_s"),
        ({"at_least": 1.1}, "at_least"),
        ({"at_least": "much"}, "at_least"),
        ({"k": 0.5}, "'k'"),
        ({"ladder": []}, "'ladder'"),
    ],
)
def test_values_that_mean_nothing_are_refused(value: dict[str, Any], names: str) -> None:
    with pytest.raises(InvalidRequestError, match=names):
        AutoConfig.parse({"policy": "auto", **value}, AutoConfig())


# --- one choice ---


@pytest.mark.parametrize(
    ("seconds", "cached", "at_least", "place", "reason"),
    [
        ((1.0, 0.6, 0.5, 0.4), (), 0.0, 0, Reason.OBJECTIVE),
        ((3.0, 1.9, 1.0, 0.5), (), 0.0, 1, Reason.OBJECTIVE),
        ((3.0, 2.9, 2.8, 2.5), (), 0.0, 3, Reason.NONE_MEETS),
        ((3.0, 2.9, 2.8, 2.5), (), 0.4, 2, Reason.NONE_MEETS),
        ((9.0, 0.2, 0.2, 0.2), (), 1.0, 0, Reason.NONE_MEETS),  # only all tokens are allowed
        ((1.0, 0.1, 0.5, 0.4), (1,), 0.0, 1, Reason.CACHED),  # one stronger beats a miss
        ((1.0, 0.1, 0.5, 0.4), (1,), 0.7, 0, Reason.OBJECTIVE),  # but not below `at_least`
        ((1.0, 0.6, 0.1, 0.4), (2,), 0.0, 0, Reason.OBJECTIVE),  # nor from two levels away
        ((0.1, 0.1, 0.5, 0.4), (0, 1), 0.0, 0, Reason.OBJECTIVE),
        ((2.1, 9.0, 9.0, 9.0), (0,), 0.0, 0, Reason.NONE_MEETS),  # a weaker hit is the fastest
    ],
)
def test_the_least_compression_that_meets_the_objective(
    seconds: tuple[float, ...],
    cached: tuple[int, ...],
    at_least: float,
    place: int,
    reason: Reason,
) -> None:
    config = AutoConfig(objective_s=2.0, at_least=at_least)
    choice = Chooser().choose(config, levels(*seconds, cached=cached))
    assert (choice.level, choice.reason) == (place, reason)
    assert choice.compression == DEFAULT_LADDER[place]
    assert choice.predicted_ttft_s == seconds[place]


def test_compression_eases_only_with_room_to_spare_and_by_all_levels_at_once() -> None:
    chooser = Chooser()
    assert chooser.choose(DEFAULT, levels(9.0, 3.0, 2.1, 1.9)).level == 3
    just_met = chooser.choose(DEFAULT, levels(1.9, 1.5, 1.2, 1.0))
    assert (just_met.level, just_met.reason) == (1, Reason.STEADY)
    assert chooser.choose(DEFAULT, levels(1.5, 1.2, 1.1, 1.0)).level == 0
    assert chooser.choose(DEFAULT, levels(1.9, 1.5, 1.2, 1.0)).level == 0, "it stays where it is"


# --- rates ---


def test_rates_follow_what_is_measured_whatever_the_seed() -> None:
    rates = Rates(100.0, 100.0, 100.0, max_prompt_tokens=1000)
    for _ in range(100):
        rates.note_pass(0.01, num_prompt_tokens=0, is_decoding=True)
        rates.note_pass(0.51, num_prompt_tokens=1000, is_decoding=True)
        rates.note_vision(4, 0.2, num_steps=8)
    work = Work(vision_patches=2, prompt_tokens=2000)
    assert rates.seconds(work, is_decoding=False) == pytest.approx(0.1 + 1.0, rel=0.01)
    assert rates.seconds(work, is_decoding=True) == pytest.approx(1.1 + 0.01 * (4 + 2), rel=0.01)


# --- simulated loads ---


@dataclass
class SimulatedEngine:
    """Does prompt work in the order of arrival, at rates that it knows but for some noise.

    Times are virtual seconds. A job is given to it when it arrives, as to a worker that has room.
    """

    full_s: float  # that one job's prompt takes with all tokens, when nothing is cached
    chooser: Chooser = field(default_factory=Chooser)
    now_s: float = 0.0
    free_at_s: float = 0.0  # when all work so far is done

    def seconds(self, place: int) -> float:
        vision_s = 0.3 * self.full_s
        return vision_s + 0.7 * self.full_s * RETAINED[place]

    def ask(self, at_s: float, config: AutoConfig, noise: float) -> tuple[Choice, float]:
        """Returns the choice, and the time to first token that came of it."""
        self.now_s = at_s
        backlog_s = max(self.free_at_s - at_s, 0.0)
        predicted = [backlog_s + self.seconds(place) for place in range(len(RETAINED))]
        choice = self.chooser.choose(config, levels(*predicted))
        self.free_at_s = at_s + backlog_s + self.seconds(choice.level) * noise
        return choice, self.free_at_s - at_s


def run(
    arrivals_s: Sequence[float], full_s: float, config: AutoConfig, noises: Iterator[float]
) -> list[tuple[Choice, float]]:
    engine = SimulatedEngine(full_s)
    return [engine.ask(at_s, config, next(noises)) for at_s in arrivals_s]


def steady(gap_s: float, number: int) -> list[float]:
    return [gap_s * place for place in range(number)]


def exact() -> Iterator[float]:
    while True:
        yield 1.0


def least_that_meets(choice: Choice, backlog_s: float, engine: SimulatedEngine) -> int | None:
    for place in range(len(RETAINED)):
        if backlog_s + engine.seconds(place) <= DEFAULT.objective_s:
            return place
    return None


gaps = st.lists(st.floats(0.0, 4.0), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(gaps_s=gaps, full_s=st.floats(0.05, 3.0), noise=st.floats(0.8, 1.25))
def test_the_objective_is_met_wherever_a_level_can_meet_it(
    gaps_s: list[float], full_s: float, noise: float
) -> None:
    engine, at_s = SimulatedEngine(full_s), 0.0
    for gap_s in gaps_s:
        at_s += gap_s
        backlog_s = max(engine.free_at_s - at_s, 0.0)
        choice, ttft_s = engine.ask(at_s, DEFAULT, noise)
        least = least_that_meets(choice, backlog_s, engine)
        if least is None:
            assert choice.reason is Reason.NONE_MEETS
            assert choice.level == len(RETAINED) - 1
        else:
            assert choice.predicted_ttft_s <= DEFAULT.objective_s
            assert least <= choice.level <= least + 1, "no more than needed by more than a level"
        assert ttft_s <= backlog_s + engine.seconds(choice.level) * max(noise, 1.0) + 1e-9


@settings(max_examples=50, deadline=None)
@given(full_s=st.floats(0.05, 1.5), spare=st.floats(1.05, 4.0))
def test_below_capacity_nothing_is_compressed(full_s: float, spare: float) -> None:
    answers = run(steady(full_s * spare, 40), full_s, DEFAULT, exact())
    assert {choice.level for choice, _ in answers} == {0}


@settings(max_examples=50, deadline=None)
@given(full_s=st.floats(0.1, 1.0), load=st.floats(1.1, 3.0))
def test_under_constant_overload_levels_do_not_flap(full_s: float, load: float) -> None:
    """They change less often than without hysteresis, where that changes them often."""
    arrivals_s = steady(full_s / load, 400)
    with_it = num_changes(run(arrivals_s, full_s, DEFAULT, exact())[100:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "EASING", 1.0)
        without = num_changes(run(arrivals_s, full_s, DEFAULT, exact())[100:])
    assert with_it <= max(without, 20)
    assert with_it <= 150


def num_changes(answers: list[tuple[Choice, float]]) -> int:
    places = [choice.level for choice, _ in answers]
    return sum(one != other for one, other in pairwise(places))


def test_a_burst_passes_and_leaves_no_trace() -> None:
    calm = steady(2.0, 20)
    burst = [40.0 + 0.05 * number for number in range(20)]
    after = [80.0 + 2.0 * number for number in range(20)]
    answers = run([*calm, *burst, *after], 0.5, DEFAULT, exact())
    places = [choice.level for choice, _ in answers]
    assert set(places[:20]) == {0} and max(places[20:40]) == 3 and set(places[40:]) == {0}
    all_tokens = [0.5 * (number + 1) - 0.05 * number for number in range(20)]
    of_burst = [ttft_s for _, ttft_s in answers[20:40]]
    assert max(of_burst) < 0.7 * max(all_tokens)
    assert sum(ttft_s <= 2.0 for ttft_s in of_burst) >= sum(s <= 2.0 for s in all_tokens)
