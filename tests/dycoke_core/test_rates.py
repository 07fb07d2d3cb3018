"""Rates that are measured, and what they predict."""

import pytest

from dycoke_core.rates import Rates, Work


def test_rates_follow_what_is_measured_whatever_the_seed() -> None:
    rates = Rates(100.0, 100.0, 100.0, max_prompt_tokens=1000)
    for _ in range(100):
        rates.note_pass(0.01, num_prompt_tokens=0, is_decoding=True)
        rates.note_pass(0.51, num_prompt_tokens=1000, is_decoding=True)
        rates.note_vision(4, 0.2, num_steps=8)
    work = Work(vision_patches=2, prompt_tokens=2000)
    assert rates.seconds(work, is_decoding=False) == pytest.approx(0.1 + 1.0, rel=0.01)
    assert rates.seconds(work, is_decoding=True) == pytest.approx(1.1 + 0.01 * (4 + 2), rel=0.01)


def test_means_of_work_move_towards_what_is_new() -> None:
    mean = Work(100, 10).towards(Work(0, 30), 0.25)
    assert mean == Work(75, 15)
