"""Whose turn it is, and what each setting asks for."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loadtest.auto import bench as module
from loadtest.auto.bench import Bench, as_compression
from loadtest.auto.profile import Arrival
from loadtest.auto.run import Outcome, RunResult
from loadtest.running import RunningService
from tests.loadtest.auto.canned import VIDEOS

K9 = '{"policy": "dycoke", "k": 0.9}'


class Loop:
    """Replaces the open loop: records what it is given and answers at once."""

    runs: list[tuple[str, Any, Sequence[Arrival]]]
    stalls_s: Iterator[float]

    def __init__(self, url: str, videos: object, compression: Any, *, judges: bool) -> None:
        self._url, self._compression = url, compression

    def run(self, arrivals: Sequence[Arrival]) -> RunResult:
        Loop.runs.append((self._url, self._compression, arrivals))
        return RunResult([Outcome(arrival) for arrival in arrivals], next(Loop.stalls_s))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    @contextmanager
    def service(folder: Path, settings: Mapping[str, str]) -> Iterator[RunningService]:
        assert not list(folder.iterdir()), "nothing of an earlier service"
        yield RunningService(f"http://{folder.name}", folder / "service.log")

    monkeypatch.setattr(module, "running_service", service)
    monkeypatch.setattr(module, "OpenLoop", Loop)
    monkeypatch.setattr(module, "warm_up", lambda *_: None)
    Loop.runs, Loop.stalls_s = [], iter([0.0] * 100)
    return Bench(tmp_path, {}, VIDEOS, judges=True)


def run(bench: Bench, settings: Sequence[str], num_turns: int, **options: Any) -> list[Any]:
    plan = {"phase_s": 1.0, "capacity_per_s": 4.0, "objective_s": 1.5, "seed": 1} | options
    return bench.run(settings, num_turns=num_turns, **plan)


def test_settings_get_the_same_arrivals_each_against_a_fresh_service(bench: Bench) -> None:
    turns = run(bench, ("full", "dycoke", "auto"), 2)
    assert [list(turn) for turn in turns] == [
        ["full", "dycoke", "auto"],
        ["dycoke", "auto", "full"],
    ]
    first, second = Loop.runs[:3], Loop.runs[3:]
    assert first[0][2] == first[1][2] == first[2][2] != second[0][2]
    assert second[0][2] == second[1][2] == second[2][2]
    assert len({url for url, _, _ in Loop.runs}) == 6


def test_auto_is_told_the_objective_and_fixed_settings_may_be_json(bench: Bench) -> None:
    run(bench, ("full", K9, "auto"), 1)
    assert [compression for _, compression, _ in Loop.runs] == [
        "full",
        {"policy": "dycoke", "k": 0.9},
        {"policy": "auto", "objective_s": 1.5},
    ]
    assert as_compression("auto") == "auto"


def test_run_of_a_late_load_generator_is_repeated_against_another_service(bench: Bench) -> None:
    Loop.stalls_s = iter([5.0, 0.0])
    (turn,) = run(bench, ("full",), 1)
    assert turn["full"].max_stall_s == 0.0
    (one, _, arrivals), (other, _, again) = Loop.runs
    assert one != other and arrivals == again


def test_phases_too_short_for_a_question_are_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="no question"):
        run(bench, ("full",), 1, phase_s=1e-6, capacity_per_s=0.01)
