"""The rule of policy `auto`, one choice after another."""

import pytest

from dycoke_core.auto import DEFAULT_LADDER, AutoConfig, Reason
from dycoke_core.config import Priority
from dycoke_core.level_choice import (
    MAX_COURSES,
    NOTHING_WAITS,
    Chooser,
    Level,
    Outlook,
    Situation,
)

RETAINED = (1.0, 0.62, 0.47, 0.32)  # of DEFAULT_LADDER at 32 frames
COSTS_S = (1.0, 0.7, 0.6, 0.5)  # of a request of late, by level
OBJECTIVE_S = 2.0
DEFAULT = AutoConfig(objective_s=OBJECTIVE_S)


def levels(*seconds: float, cached: tuple[int, ...] = ()) -> dict[int, Level]:
    return {
        place: Level(DEFAULT_LADDER[place], RETAINED[place], place in cached, own_s)
        for place, own_s in enumerate(seconds)
    }


def situation(
    outlook: Outlook = NOTHING_WAITS,
    *,
    ahead_s: float = 0.0,
    queued_s: float = 0.0,
    priority: Priority = "normal",
) -> Situation:
    return Situation(
        COSTS_S, ahead_s=ahead_s, queued_s=queued_s, outlook=outlook, priority=priority
    )


def after(ahead_s: float) -> dict[int, Level]:
    """Of a request like the recent ones, after this much work."""
    return levels(*(ahead_s + cost_s for cost_s in COSTS_S))


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
        ((3.0, 2.5, 2.2, 1.0), (0,), 0.0, 3, Reason.OBJECTIVE),  # on its way, and comes too late
        ((3.0, 1.5, 1.2, 1.0), (0, 2), 0.0, 2, Reason.CACHED),  # the other one comes in time
    ],
)
def test_the_least_compression_that_meets_the_objective(
    seconds: tuple[float, ...],
    cached: tuple[int, ...],
    at_least: float,
    place: int,
    reason: Reason,
) -> None:
    config = AutoConfig(objective_s=OBJECTIVE_S, at_least=at_least)
    choice = Chooser().choose(config, levels(*seconds, cached=cached), situation(), now_s=0.0)
    assert (choice.level, choice.reason) == (place, reason)
    assert choice.compression == DEFAULT_LADDER[place]
    assert choice.predicted_ttft_s == seconds[place]


def test_what_a_request_has_waited_counts_against_its_objective() -> None:
    choice = Chooser().choose(DEFAULT, levels(*COSTS_S), situation(), waited_s=1.35, now_s=0.0)
    assert (choice.level, choice.reason) == (2, Reason.OBJECTIVE)
    assert choice.predicted_ttft_s == pytest.approx(1.95)


@pytest.mark.parametrize(
    ("waited_s", "place", "reason"),
    [
        ((), 0, Reason.OBJECTIVE),
        ((0.0,), 1, Reason.QUEUE),  # 2.0 s at full tokens, 1.4 s at the next level
        ((0.1, 0.0), 3, Reason.QUEUE),  # 1.6 s is the least that a fifth of room is left for
        ((0.0, 0.0, 0.0, 0.0), 3, Reason.QUEUE),  # the last cannot be in time at any level
        ((5.0,), 3, Reason.QUEUE),  # it is late already: the sooner it is through the better
    ],
)
def test_those_that_wait_behind_are_to_be_in_time_too(
    waited_s: tuple[float, ...], place: int, reason: Reason
) -> None:
    choice = Chooser().choose(DEFAULT, levels(*COSTS_S), situation(Outlook(waited_s)), now_s=0.0)
    assert (choice.level, choice.reason) == (place, reason)


@pytest.mark.parametrize(
    ("arrivals_per_s", "place", "reason"),
    [
        (0.0, 0, Reason.OBJECTIVE),
        (0.89, 0, Reason.OBJECTIVE),
        (0.91, 1, Reason.LOAD),
        (1.4, 2, Reason.LOAD),
        (9.0, 3, Reason.LOAD),  # none keeps up
    ],
)
def test_a_level_that_cannot_keep_up_is_not_chosen(
    arrivals_per_s: float, place: int, reason: Reason
) -> None:
    outlook = Outlook(arrivals_per_s=arrivals_per_s)
    choice = Chooser().choose(DEFAULT, levels(*COSTS_S), situation(outlook), now_s=0.0)
    assert (choice.level, choice.reason) == (place, reason)


@pytest.mark.parametrize(
    ("last_s", "rate"),
    [(0.9, 0.5), (1.0, 3.0)],  # half the objective is long enough to have a rate
)
def test_the_last_arrivals_count_where_they_come_faster(last_s: float, rate: float) -> None:
    seen = Outlook(arrivals_per_s=0.5, last_arrivals_per_s=3.0, last_s=last_s)
    assert seen.rate(OBJECTIVE_S) == rate
    calm = Outlook(arrivals_per_s=0.5, last_arrivals_per_s=0.1, last_s=9.0)
    assert calm.rate(OBJECTIVE_S) == 0.5
    choice = Chooser().choose(DEFAULT, levels(*COSTS_S), situation(seen), now_s=0.0)
    assert choice.level == (3 if rate > 0.5 else 0)


def test_load_is_not_looked_at_while_nothing_piles_up() -> None:
    lax = AutoConfig(objective_s=4 * COSTS_S[0])
    chooser, often = Chooser(), 1.5

    def at(waited_s: tuple[float, ...], now_s: float) -> int:
        meets = situation(Outlook(waited_s, often))
        return chooser.choose(lax, levels(*COSTS_S), meets, now_s=now_s).level

    assert at((), now_s=0.0) == 0
    assert at((0.0,), now_s=1.0) == 2
    assert at((), now_s=9.0) == 2, "it has not eased"


def test_load_eases_only_when_it_has_come_down_amply() -> None:
    chooser = Chooser()

    def at(arrivals_per_s: float, now_s: float) -> int:
        outlook = Outlook(arrivals_per_s=arrivals_per_s)
        return chooser.choose(DEFAULT, levels(*COSTS_S), situation(outlook), now_s=now_s).level

    assert at(1.0, now_s=0.0) == 1
    assert at(0.8, now_s=100.0) == 1, "0.8 is below the limit, but hardly"
    assert at(0.7, now_s=200.0) == 0
    assert at(0.8, now_s=300.0) == 0, "it stays where it is"
    assert at(9.0, now_s=400.0) == 3
    assert at(1.4, now_s=500.0) == 2, "no more than a level beyond what just keeps up"


def test_compression_eases_one_objective_after_a_stronger_level_was_needed() -> None:
    chooser = Chooser()
    hard = chooser.choose(DEFAULT, after(1.45), situation(ahead_s=1.45), now_s=10.0)
    assert (hard.level, hard.reason) == (3, Reason.OBJECTIVE)
    held = chooser.choose(DEFAULT, after(0.0), situation(), now_s=11.9)
    assert (held.level, held.reason) == (3, Reason.STEADY)
    eased = chooser.choose(DEFAULT, after(0.0), situation(), now_s=12.0)
    assert (eased.level, eased.reason) == (0, Reason.OBJECTIVE)


@pytest.mark.parametrize(
    ("seconds", "waited_s"),
    [
        (COSTS_S, 1.45),  # its upload took long
        ((9.0, 3.0, 2.1, 1.9), 0.0),  # it is large
        ((9.0, 9.0, 9.0, 9.0), 0.0),
    ],
)
def test_what_a_request_alone_needs_holds_no_other(
    seconds: tuple[float, ...], waited_s: float
) -> None:
    chooser = Chooser()
    own = chooser.choose(DEFAULT, levels(*seconds), situation(), waited_s=waited_s, now_s=0.0)
    assert own.level == 3
    next_one = chooser.choose(DEFAULT, levels(*COSTS_S), situation(), now_s=0.1)
    assert (next_one.level, next_one.reason) == (0, Reason.OBJECTIVE)


def test_a_request_that_fits_no_weak_level_or_allows_no_strong_one_holds_no_other() -> None:
    chooser = Chooser()
    large = {3: levels(*COSTS_S)[3]}
    assert chooser.choose(DEFAULT, large, situation(), now_s=0.0).level == 3
    assert chooser.choose(DEFAULT, levels(*COSTS_S), situation(), now_s=0.1).level == 0
    demanding = AutoConfig(objective_s=OBJECTIVE_S, at_least=1.0)
    hard = situation(ahead_s=1.45)
    assert chooser.choose(demanding, after(1.45), hard, now_s=0.2).level == 0
    assert chooser.choose(DEFAULT, levels(*COSTS_S), situation(), now_s=0.3).level == 3, (
        "the next one is held to what was needed then"
    )


def test_a_small_request_gets_what_those_of_late_need() -> None:
    """So that sizes alone do not make levels flap."""
    choice = Chooser().choose(
        DEFAULT, levels(1.5, 1.5, 1.5, 1.5), situation(ahead_s=1.45), now_s=0.0
    )
    assert (choice.level, choice.reason) == (3, Reason.STEADY)


def test_how_long_requests_are_queued_counts_for_the_next_ones() -> None:
    chooser = Chooser()
    late = situation(queued_s=1.45)
    assert chooser.choose(DEFAULT, after(0.0), late, waited_s=1.45, now_s=0.0).level == 3
    assert chooser.choose(DEFAULT, after(0.0), situation(), now_s=1.9).reason is Reason.STEADY


@pytest.mark.parametrize(
    ("objective_s", "priority"),
    [(0.1, "normal"), (1.5, "normal"), (3600.0, "normal"), (OBJECTIVE_S, "low")],
)
def test_another_objective_or_priority_holds_nobody(objective_s: float, priority: Priority) -> None:
    other = AutoConfig(objective_s=objective_s)
    chooser = Chooser()
    theirs = situation(ahead_s=objective_s, priority=priority)
    assert chooser.choose(other, after(objective_s), theirs, now_s=0.0).level == 3
    assert chooser.choose(DEFAULT, after(0.0), situation(), now_s=0.01).level == 0
    assert chooser.choose(DEFAULT, after(1.45), situation(ahead_s=1.45), now_s=0.02).level == 3
    chooser.choose(other, after(0.0), situation(priority=priority), now_s=1.9)
    assert chooser.choose(DEFAULT, after(0.0), situation(), now_s=1.9).reason is Reason.STEADY


def test_nearly_the_same_objective_is_held_to_what_was_needed() -> None:
    """Such as what is left of a client's deadline, which is never the same."""
    chooser = Chooser()
    assert chooser.choose(DEFAULT, after(1.45), situation(ahead_s=1.45), now_s=0.0).level == 3
    next_one = AutoConfig(objective_s=OBJECTIVE_S * 1.01)
    choice = chooser.choose(next_one, after(0.0), situation(), now_s=1.9)
    assert (choice.level, choice.reason) == (3, Reason.STEADY)


def test_only_the_objectives_that_were_used_last_are_remembered() -> None:
    chooser = Chooser()
    hard = situation(ahead_s=1.45)
    others = [AutoConfig(objective_s=OBJECTIVE_S * 1.2**number) for number in range(1, 34)]
    assert chooser.choose(DEFAULT, after(1.45), hard, now_s=0.0).level == 3
    for other in others[: MAX_COURSES - 1]:
        chooser.choose(other, after(0.0), situation(), now_s=0.1)
    assert chooser.choose(DEFAULT, after(0.0), situation(), now_s=0.2).level == 3
    for other in others[:MAX_COURSES]:
        chooser.choose(other, after(0.0), situation(), now_s=0.3)
    assert chooser.choose(DEFAULT, after(0.0), situation(), now_s=0.4).level == 0


def test_a_weaker_level_whose_prefix_is_there_is_taken_whatever_the_load() -> None:
    cached = levels(0.1, 0.7, 0.6, 0.5, cached=(0,))
    choice = Chooser().choose(DEFAULT, cached, situation(Outlook((0.0,) * 9, 9.0)), now_s=0.0)
    assert (choice.level, choice.reason) == (0, Reason.CACHED)


def test_at_least_bounds_what_queue_and_load_may_ask() -> None:
    config = AutoConfig(objective_s=OBJECTIVE_S, at_least=0.6)
    busy = situation(Outlook((0.0,) * 9, 9.0))
    choice = Chooser().choose(config, levels(*COSTS_S), busy, now_s=0.0)
    assert choice.level == 1
