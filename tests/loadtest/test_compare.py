"""A comparison: which runs it makes, and which it repeats."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from loadtest import compare
from loadtest.running import RunningService
from loadtest.runs import Plan, Result, summarise
from tests.loadtest.samples import raw


def test_a_run_whose_generator_stood_still_is_repeated_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stalls = iter([2.0, 0.1, 3.0, 3.0, 3.0])
    monkeypatch.setattr(
        compare,
        "run_locust",
        lambda plan, *_, **__: summarise(plan, raw() | {"max_stall_s": next(stalls)}),
    )
    options = Namespace(users=[1], duration=1.0, num_frames=8, seed=1)
    comparison = compare.Comparison(options, RunningService("http://nowhere", tmp_path), tmp_path)
    assert comparison.run_one("full", users=1).max_stall_s == 0.1
    assert comparison.run_one("full", users=1).max_stall_s == 3.0
    assert next(stalls, None) is None


def test_settings_alternate_and_the_open_loop_goes_by_what_full_tokens_managed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []

    def run(plan: Plan, *_: Any, **__: Any) -> Result:
        plans.append(plan)
        # Full tokens take one arrival a second per user; dycoke three, which must not count.
        per_user = 1 if plan.compression == "full" else 3
        arrivals = {"ask_new": per_user * plan.users * 10, "upload": 0}
        return summarise(plan, raw(TTFT_new_video=[(1.0, 0.4)]) | {"arrivals": arrivals})

    monkeypatch.setattr(compare, "run_locust", run)
    options = Namespace(users=[1, 4], duration=10.0, num_frames=8, seed=1, ttft_objective=None)
    comparison = compare.Comparison(options, RunningService("http://nowhere", tmp_path), tmp_path)
    results = comparison.run()
    assert [result.plan for result in results] == plans
    assert [(plan.compression, plan.users) for plan in plans[:4]] == [
        ("full", 1),
        ("dycoke", 1),
        ("full", 4),
        ("dycoke", 4),
    ]
    assert [plan.rate for plan in plans[4:]] == pytest.approx([1.2, 1.2, 2.4, 2.4, 3.6, 3.6])
    assert comparison.objective_s == pytest.approx(1.5 * 0.4)


def test_an_objective_that_is_given_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "run_locust", lambda plan, *_, **__: summarise(plan, raw()))
    options = Namespace(users=[1], duration=1.0, num_frames=8, seed=1, ttft_objective=0.7)
    comparison = compare.Comparison(options, RunningService("http://nowhere", tmp_path), tmp_path)
    comparison.run()
    assert comparison.objective_s == 0.7
