"""Goodput, accuracy, times and verdicts of canned outcomes."""

from collections.abc import Sequence

import pytest

from loadtest.auto.figures import LOW_LOAD, WHOLE, Comparison, Figures
from loadtest.auto.run import Outcome
from tests.loadtest.auto.canned import (
    OBJECTIVE_S,
    PHASE_S,
    PHASES,
    answered,
    chosen,
    failed,
    refused,
)


def compare(*turns: dict[str, Sequence[Outcome]]) -> Comparison:
    return Comparison(turns, PHASES, phase_s=PHASE_S, objective_s=OBJECTIVE_S)


def of(comparison: Comparison, phase: str, setting: str) -> Figures:
    (found,) = (f for f in comparison.figures() if (f.phase, f.setting) == (phase, setting))
    return found


def spread_over(phase: int, number: int, ttft_s: float, *, is_right: bool = True) -> list[Outcome]:
    """This many outcomes at even distances over a phase."""
    first_s = phase * PHASE_S
    return [
        answered(first_s + PHASE_S * place / number, ttft_s, is_right=is_right)
        for place in range(number)
    ]


def test_goodput_takes_a_first_token_in_time_and_a_right_answer() -> None:
    full = [
        answered(0.0, OBJECTIVE_S),
        answered(1.0, OBJECTIVE_S + 0.01),
        answered(2.0, 0.1, is_right=False),
        refused(3.0),
        failed(4.0),
    ]
    figures = of(compare({"full": full}), "low", "full")
    assert (figures.num_asked, figures.num_refused, figures.num_failed) == (5, 1, 1)
    assert figures.good.value == pytest.approx(0.2)
    assert figures.goodput_per_s == pytest.approx(1 / PHASE_S)
    assert figures.accuracy == pytest.approx(2 / 3), "of the three that were answered"
    assert figures.ttft_s is not None and figures.ttft_s.count == 3


def test_answers_that_nobody_judged_are_good_if_in_time() -> None:
    full = [answered(0.0, 0.5, is_right=None), answered(1.0, 2.0, is_right=None)]
    figures = of(compare({"full": full}), "low", "full")
    assert figures.accuracy is None and figures.good.value == 0.5


def test_whole_profile_counts_every_arrival_once_and_all_turns() -> None:
    turn = {"full": [*spread_over(0, 2, 0.1), *spread_over(1, 6, 5.0)]}
    comparison = compare(turn, turn)
    whole = of(comparison, WHOLE, "full")
    assert whole.num_asked == 16
    assert whole.good.value == pytest.approx(0.25), "phases weigh as many arrivals as they have"
    assert whole.goodput_per_s == pytest.approx(4 / (2 * 2 * PHASE_S))
    assert of(comparison, "high", "full").good.value == 0.0


def test_levels_are_shares_of_the_answers() -> None:
    outcomes = [
        chosen(answered(0.0, 0.1), 0),
        chosen(answered(1.0, 0.1), 3),
        chosen(answered(2.0, 0.1), 3),
        chosen(answered(3.0, 0.1), 3),
        refused(4.0),
    ]
    comparison = compare({"auto": outcomes})
    assert of(comparison, "low", "auto").levels == {"dycoke k=0.9": 0.75, "full": 0.25}
    assert comparison.claims() == [], "there is nothing to compare with"


def test_reasons_say_how_far_predictions_were_off() -> None:
    outcomes = [
        chosen(answered(0.0, 0.2), 0),
        chosen(answered(1.0, 3.0), 3, "none_meets"),
        chosen(answered(2.0, 0.4), 0),
    ]
    first, second = compare({"auto": outcomes}).by_reason()
    assert (first.reason, first.num_choices, first.in_time) == ("objective", 2, 1.0)
    assert (second.reason, second.num_choices, second.in_time) == ("none_meets", 1, 0.0)
    assert first.error_s is not None and first.error_s.p50 == pytest.approx(-0.5)


def test_interval_is_of_stretches_of_time_not_of_arrivals() -> None:
    """Half of the phase is late as a whole: that is few observations, however many arrivals."""
    few, many = (
        [
            *spread_over(0, number, 0.1)[: number // 2],
            *spread_over(0, number, 9.0)[number // 2 :],
        ]
        for number in (8, 800)
    )
    of_few, of_many = (of(compare({"full": each}), "low", "full").good for each in (few, many))
    assert (of_few.value, of_few.low, of_few.high) == pytest.approx(
        (of_many.value, of_many.low, of_many.high)
    )
    assert of_few.high - of_few.low > 0.5


def test_claims_hold_where_auto_answers_in_time_and_the_others_do_not() -> None:
    low, late = spread_over(0, 8, 0.1), spread_over(1, 32, 5.0)
    wrong_at_low = [
        answered(o.arrival.at_s, 0.1, is_right=place > 0) for place, o in enumerate(low)
    ]
    turn = {
        "full": [*low, *late],
        "dycoke": [*wrong_at_low, *late],
        "auto": [*low, *spread_over(1, 32, 0.5)],
    }
    claims = {(claim.phase, claim.measure): claim for claim in compare(turn).claims()[:3]}
    assert claims[LOW_LOAD, "accuracy"].difference.value == 0
    assert claims["low", "goodput"].verdict == "no difference shown"
    assert claims["low", "goodput"].text.endswith(" full"), "the best of the fixed ones"
    assert claims["high", "goodput"].verdict == "holds"
    whole = compare(turn).claims()[3:]
    assert [claim.phase for claim in whole] == [WHOLE, WHOLE]
    assert all(claim.verdict == "holds" for claim in whole)


def test_claims_fail_where_auto_is_worse() -> None:
    right = [*spread_over(0, 8, 0.1), *spread_over(1, 8, 0.1)]
    wrong = [answered(o.arrival.at_s, 0.1, is_right=False) for o in right]
    verdicts = {
        (claim.phase, claim.measure): claim.verdict
        for claim in compare({"full": right, "auto": wrong}).claims()
    }
    assert verdicts == {
        (LOW_LOAD, "accuracy"): "fails",
        ("low", "goodput"): "fails",
        ("high", "goodput"): "fails",
        (WHOLE, "goodput"): "fails",
    }


def test_accuracy_at_low_load_compares_answers_that_both_gave() -> None:
    full = [answered(0.0, 0.1), refused(1.0), answered(2.0, 0.1), answered(11.0, 0.1)]
    auto = [answered(0.0, 0.1), answered(1.0, 0.1), refused(2.0), answered(11.0, 0.1)]
    (accuracy, *_) = compare({"full": full, "auto": auto}).claims()
    assert accuracy.measure == "accuracy" and accuracy.text.endswith("(1 answers)")


@pytest.mark.parametrize(("number", "verdict"), [(400, "in the mean"), (440, "holds")])
def test_accuracy_holds_only_on_enough_answers(number: int, verdict: str) -> None:
    same = spread_over(0, number, 0.1)
    (accuracy, *_) = compare({"full": same, "auto": same}).claims()
    assert accuracy.difference.value == 0 and accuracy.verdict == verdict


def test_without_a_judge_there_is_no_claim_about_accuracy() -> None:
    full = [answered(0.0, 0.1, is_right=None), answered(11.0, 0.1, is_right=None)]
    claims = compare({"full": full, "auto": full}).claims()
    assert claims and all(claim.measure == "goodput" for claim in claims)
