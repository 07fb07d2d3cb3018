"""The report of a comparison, on disk."""

import json
from pathlib import Path

from loadtest.report import write_report
from loadtest.runs import summarise
from tests.loadtest.samples import CLOSED, OPEN, raw


def test_report_has_a_table_plots_and_everything_as_json(tmp_path: Path) -> None:
    samples = raw(TTFT_new_video=[(1.0, 0.5)], E2E_new_video=[(1.5, 1.0)])
    about = {
        "model": "m",
        "commit": "c",
        "date": "d",
        "packages": {"torch": "t"},
        "machine": {"cores": 2, "cpu": "x"},
    }
    results = [summarise(plan, samples) for plan in (CLOSED, OPEN)]
    write_report(tmp_path, results, objective_s=1.0, about=about)
    text = (tmp_path / "report.md").read_text()
    assert "| 2 | full | 0.10 |" in text and "| 1.50 | full | 0.10 |" in text
    content = json.loads((tmp_path / "results.json").read_text())
    assert [run["good_share"] for run in content["runs"]] == [0.25, 0.25]
    assert content["machine"]["cores"] == 2
    for name in ("closed-loop.png", "open-loop.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG" and name in text
