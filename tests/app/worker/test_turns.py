"""Whose turn it is, where suspects wait beside others."""

from app.worker.turns import OTHERS_S, PROBATION_S, Turn, Turns


def test_anybodys_turn_until_a_suspect_runs() -> None:
    assert Turns().turn(100.0) is Turn.ANY


def test_suspects_go_first_and_then_the_others_and_then_anybody() -> None:
    turns = Turns()
    turns.begin_probation(100.0)
    assert turns.turn(100.0 + PROBATION_S - 0.1) is Turn.SUSPECTS
    assert turns.turn(100.0 + PROBATION_S) is Turn.OTHERS
    assert turns.turn(100.0 + PROBATION_S + OTHERS_S) is Turn.ANY


def test_each_further_suspect_leaves_the_turn_as_long_as_it_was() -> None:
    turns = Turns()
    turns.begin_probation(100.0)
    turns.begin_probation(100.0 + PROBATION_S - 0.1)
    assert turns.turn(100.0 + PROBATION_S) is Turn.OTHERS


def test_a_probation_that_lasted_longer_than_the_turn_begins_no_other() -> None:
    """A single prefill may take longer than all of it; the others' turn comes all the same."""
    turns = Turns()
    turns.begin_probation(100.0)
    assert turns.turn(100.0 + PROBATION_S + 1.0) is Turn.OTHERS


def test_a_turn_ends_where_nobody_waits_for_it() -> None:
    turns = Turns()
    turns.begin_probation(100.0)
    turns.none_waits()
    assert turns.turn(100.0) is Turn.ANY
