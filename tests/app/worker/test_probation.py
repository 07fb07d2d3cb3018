"""Whose turn it is while suspects and other jobs wait."""

from app.worker.probation import OTHERS_S, PROBATION_S, MayRun, Probation


def test_anybodys_turn_until_a_suspect_runs() -> None:
    assert Probation().who(100.0) is MayRun.ANY


def test_suspects_go_first_and_then_the_others_and_then_anybody() -> None:
    probation = Probation()
    probation.begin_probation(100.0)
    assert probation.who(100.0 + PROBATION_S - 0.1) is MayRun.SUSPECTS
    assert probation.who(100.0 + PROBATION_S) is MayRun.OTHERS
    assert probation.who(100.0 + PROBATION_S + OTHERS_S) is MayRun.ANY


def test_each_further_suspect_leaves_the_turn_as_long_as_it_was() -> None:
    probation = Probation()
    probation.begin_probation(100.0)
    probation.begin_probation(100.0 + PROBATION_S - 0.1)
    assert probation.who(100.0 + PROBATION_S) is MayRun.OTHERS


def test_a_probation_that_lasted_longer_than_the_turn_begins_no_other() -> None:
    """A single prefill may take longer than all of it; the others still get their turn."""
    probation = Probation()
    probation.begin_probation(100.0)
    assert probation.who(100.0 + PROBATION_S + 1.0) is MayRun.OTHERS


def test_a_turn_ends_where_nobody_waits_for_it() -> None:
    probation = Probation()
    probation.begin_probation(100.0)
    probation.none_waits()
    assert probation.who(100.0) is MayRun.ANY
