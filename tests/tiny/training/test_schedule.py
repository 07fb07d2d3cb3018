"""Learning rates by step."""

import pytest

from dycoke_core.tiny.training.schedule import DECAY, learning_rate_factor, steps_to_finish


def test_the_learning_rate_warms_up_falls_slowly_and_then_to_zero() -> None:
    factors = [learning_rate_factor(step, 1000) for step in range(1000)]
    assert factors[0] < 0.1 and factors[-1] < 0.002
    assert factors[40:150] == [1.0] * 110
    assert factors[150:] == sorted(factors[150:], reverse=True)
    assert factors[599] == pytest.approx(0.5), "half of it at four times the steps"
    before = learning_rate_factor(299, 1000)
    assert learning_rate_factor(299, steps_to_finish(299)) == pytest.approx(before, abs=0.01)
    assert steps_to_finish(300) == pytest.approx(300 / (1 - DECAY), abs=1)


def test_a_run_that_is_told_to_finish_has_a_step_left() -> None:
    for step in (0, 1, 2, 7, 1000):
        total = steps_to_finish(step)
        assert total > step
        assert learning_rate_factor(total - 1, total) > 0
