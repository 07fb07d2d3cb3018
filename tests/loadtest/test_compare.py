"""A comparison: which runs it makes, and which it repeats."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from loadtest import compare
from loadtest.running import RunningService
from loadtest.runs import summarise


def raw(**samples: list[tuple[float, float]]) -> dict[str, Any]:
    return {
        "failures": [],
        "max_stall_s": 0.1,
        "arrivals": {"ask_new": 2, "ask_again": 2, "upload": 3},
        "samples": {name.replace("_", " "): values for name, values in samples.items()},
        "locust": [],
    }


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
