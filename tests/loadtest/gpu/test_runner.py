"""Sections that fail, hang or kill their process, and what becomes of the others."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from loadtest.gpu import runner
from loadtest.gpu.kit import Kit, Section
from loadtest.gpu.report import Report


def kit_at(directory: Path) -> Kit:
    return Kit.create(Report(directory, is_dry=True))


def section(name: str, run: Callable[[Kit], None], process: str = "one") -> Section:
    return Section(name, run, share=1.0, process=process)


def recording(key: str) -> Callable[[Kit], None]:
    return lambda kit: kit.report.record(key, 1.0, "ms") and None


def fail(kit: Kit) -> None:
    kit.report.record("before", 1.0, "ms")
    raise KeyError("nothing of this name")


def test_a_failed_section_leaves_its_traceback_and_figures_and_the_next_one_runs(
    tmp_path: Path,
) -> None:
    kit = kit_at(tmp_path)
    assert runner.run_here(kit, [section("bad", fail), section("good", recording("after"))], 60)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["sections"]["bad"]["status"] == "failed"
    assert "KeyError: 'nothing of this name'" in content["sections"]["bad"]["traceback"]
    assert content["sections"]["good"]["status"] == "ok"
    assert content["figures"].keys() == {"before", "after"}


def test_time_that_a_section_leaves_over_goes_to_the_others(tmp_path: Path) -> None:
    kit = kit_at(tmp_path)
    sections = [section("first", lambda kit: None), section("second", lambda kit: None)]
    runner.run_here(kit, sections, 100)
    runs = kit.report.sections
    assert runs["first"].budget_s == pytest.approx(50, abs=1)
    assert runs["second"].budget_s == pytest.approx(100, abs=1)


def test_a_section_that_never_ends_is_interrupted(tmp_path: Path) -> None:
    def hang(kit: Kit) -> None:
        while True:
            pass

    with pytest.raises(runner.SectionTimeout), runner.interrupted_after(0.05):
        hang(kit_at(tmp_path))


def test_figures_are_on_disk_before_the_section_ends(tmp_path: Path) -> None:
    def look(kit: Kit) -> None:
        kit.report.record("early", [3.0, 1.0, 2.0], "ms")
        figure = json.loads((tmp_path / "report.json").read_text())["figures"]["early"]
        assert (figure["value"], figure["low"], figure["high"]) == (2.0, 1.0, 3.0)

    kit = kit_at(tmp_path)
    runner.run_here(kit, [section("look", look)], 60)
    assert kit.report.sections["look"].status == "ok"


class Processes:
    """Stands in for child processes: each runs its sections here, until one that is deadly."""

    def __init__(self, directory: Path, deadly: dict[str, int | None]) -> None:
        self.directory, self.deadly = directory, deadly
        self.started: list[list[str]] = []

    def spawn(self, sections: Sequence[Section], seconds: float) -> int | None:
        self.started.append([section.name for section in sections])
        kit = kit_at(self.directory)
        kit.report.load()
        for one in sections:
            if one.name in self.deadly and self.deadly[one.name] != runner.LOST_DEVICE:
                kit.report.sections[one.name] = kit.report.sections.get(
                    one.name, runner.SectionRun("running", 1.0)
                )
                kit.report.save()
                return self.deadly[one.name]
            runner.run_here(kit, [one], seconds)
            if one.name in self.deadly:
                return runner.LOST_DEVICE
        return 0


@pytest.mark.parametrize("code", [-11, None, runner.LOST_DEVICE])
def test_sections_after_a_dead_process_run_in_another(code: int | None, tmp_path: Path) -> None:
    sections = [
        section("a", recording("a")),
        section("b", fail),
        section("c", recording("c")),
        section("d", recording("d"), process="two"),
    ]
    processes = Processes(tmp_path, {"b": code})
    report = Report(tmp_path, is_dry=True)
    runner.run_in_processes(report, sections, 60, processes.spawn)
    assert processes.started == [["a", "b", "c"], ["c"], ["d"]]
    statuses = {name: run.status for name, run in report.sections.items()}
    assert statuses == {"a": "ok", "b": "failed", "c": "ok", "d": "ok"}
    assert report.figures.keys() >= {"a", "c", "d"}
    assert report.sections["b"].traceback


def test_a_process_that_does_nothing_does_not_go_on_for_ever(tmp_path: Path) -> None:
    report = Report(tmp_path, is_dry=True)
    report.save()
    started: list[int] = []

    def spawn(sections: Sequence[Section], seconds: float) -> int:
        started.append(len(sections))
        return 1

    sections = [section("a", fail), section("b", fail)]
    runner.run_in_processes(report, sections, 60, spawn)
    assert started == [2, 1]
    assert {run.status for run in report.sections.values()} == {"failed"}
