"""What a run has found: figures with their spread, verdicts, and files that are always whole."""

import json
from pathlib import Path

import pytest

from loadtest.gpu.goals import BY_KEY
from loadtest.gpu.report import Report, SectionRun


@pytest.fixture
def report(tmp_path: Path) -> Report:
    report = Report(tmp_path, is_dry=False)
    report.sections["decode"] = SectionRun("running", 60.0)
    report.current = "decode"
    return report


def test_a_figure_is_the_median_of_its_samples_with_its_spread(report: Report) -> None:
    assert report.record("decode_b64_full_ms", [9.0, 11.0, 8.0]) == 9.0
    figure = report.figures["decode_b64_full_ms"]
    assert (figure.low, figure.high, figure.num_samples) == (8.0, 11.0, 3)
    assert (figure.unit, figure.section) == ("ms", "decode")
    assert report.record("of my own", 3, "GB") == 3


@pytest.mark.parametrize("samples", [[], [float("nan")], [1.0, float("inf")]])
def test_what_was_not_measured_is_no_figure(report: Report, samples: list[float]) -> None:
    with pytest.raises(ValueError, match="no finite samples"):
        report.record("decode_b64_full_ms", samples)
    assert not report.figures


def test_a_goal_is_met_by_its_bound_or_by_a_count(report: Report) -> None:
    bounded, counted = BY_KEY["decode_b64_full_ms"], BY_KEY["kv_full_mb"]
    assert report.verdict(bounded) is None, "not measured"
    report.record(bounded.key, bounded.goal or 0.0)
    assert report.verdict(bounded) is True
    report.record(bounded.key, 2 * (bounded.goal or 0.0))
    assert report.verdict(bounded) is False
    report.record(counted.key, 377.0, is_met=False)
    assert report.verdict(counted) is False
    with pytest.raises(ValueError, match="exact count"):
        counted.is_met(377.0)


def test_figures_of_a_dry_run_meet_nothing(tmp_path: Path) -> None:
    report = Report(tmp_path, is_dry=True)
    report.record("decode_b64_full_ms", 0.1)
    assert report.verdict(BY_KEY["decode_b64_full_ms"]) is None
    assert "dry run" in (tmp_path / "report.md").read_text()


def test_another_process_goes_on_with_what_is_on_disk(report: Report) -> None:
    report.record("decode_b64_full_ms", [9.0, 11.0], note="hot")
    report.note("a word")
    report.detail("steps", [1, 2])
    other = Report(report.directory, is_dry=False)
    other.load()
    assert other.figures == report.figures and other.sections == report.sections
    other.record("decode_b64_ttm_ms", 7.0)
    content = json.loads((report.directory / "report.json").read_text())
    assert content["figures"].keys() == {"decode_b64_full_ms", "decode_b64_ttm_ms"}
    assert content["sections"]["decode"]["details"] == {"steps": [1, 2]}
    assert not list(report.directory.glob("*.partial"))


def test_the_summary_for_people_names_every_goal(report: Report) -> None:
    report.record("decode_b64_full_ms", 9.0)
    report.save()
    text = (report.directory / "report.md").read_text()
    assert all(goal.title in text for goal in BY_KEY.values())
