"""What is written about a comparison."""

import csv
import json
from pathlib import Path
from typing import Any

from loadtest.auto.figures import Comparison
from loadtest.auto.report import write_report
from tests.loadtest.auto.canned import (
    OBJECTIVE_S,
    PHASE_S,
    PHASES,
    answered,
    chosen,
    failed,
    refused,
)

ABOUT: dict[str, Any] = {
    "model": "bundled",
    "commit": "c",
    "date": "d",
    "packages": {"torch": "t"},
    "machine": {"cores": 2, "cpu": "x", "load_before": 0.5},
    "calibration": {"capacity_per_s": 4.0, "idle_ttft_s": 0.3, "objective_s": OBJECTIVE_S},
    "max_stall_s": 0.25,
}


def comparison(*, with_auto: bool = True) -> Comparison:
    turn = {
        "full": [answered(0.0, 0.25), answered(12.0, 4.0), refused(13.0)],
        "auto": [
            chosen(answered(0.0, 0.25), 0),
            chosen(answered(12.0, 0.5), 3),
            failed(13.0),
        ],
    }
    if not with_auto:
        del turn["auto"]
    return Comparison([turn], PHASES, phase_s=PHASE_S, objective_s=OBJECTIVE_S)


def test_report_has_tables_claims_and_a_plot(tmp_path: Path) -> None:
    write_report(tmp_path / "new", comparison(), ABOUT)
    text = (tmp_path / "new" / "report.md").read_text()
    assert "| high | 2 | auto | 2 | 50% [" in text
    assert "| 0.500 / 0.500 | 0 | 1 | dycoke k=0.9 100% |" in text
    assert "| high | 2 | full | 2 | 0% [0%, 0%] | 0.00 | 1.000 | 4.000 / 4.000 | 1 | 0 |  |" in text
    assert "| goodput | auto is above full | whole profile | +0.333 [" in text
    assert "| objective | 2 | 100% | -0.500 / -0.500 |" in text
    assert "Goodput: right answers" in text and "within 1.00 s" in text
    assert "![](timeline.png)" in text
    assert (tmp_path / "new" / "timeline.png").read_bytes()[:4] == b"\x89PNG"


def test_json_says_where_the_figures_come_from(tmp_path: Path) -> None:
    write_report(tmp_path, comparison(), ABOUT)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["machine"] == ABOUT["machine"] and content["objective_s"] == OBJECTIVE_S
    assert [(f["phase"], f["setting"]) for f in content["figures"]][:2] == [
        ("low", "full"),
        ("low", "auto"),
    ]
    assert {claim["verdict"] for claim in content["claims"]} <= {
        *("holds", "fails", "in the mean", "not shown", "no difference shown")
    }


def test_every_arrival_is_kept_under_every_setting(tmp_path: Path) -> None:
    write_report(tmp_path, comparison(), ABOUT)
    with (tmp_path / "answers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["setting"] for row in rows] == ["full"] * 3 + ["auto"] * 3
    assert rows[2]["refused"] == "queue_full" and rows[2]["ttft_s"] == ""
    assert rows[4]["compression"] == "dycoke k=0.9" and rows[4]["predicted_ttft_s"] == "1.000"
    assert rows[5]["failure"] == "the stream broke"


def test_fixed_settings_alone_make_a_report_without_claims(tmp_path: Path) -> None:
    about = ABOUT | {"calibration": ABOUT["calibration"] | {"idle_ttft_s": None}}
    write_report(tmp_path, comparison(with_auto=False), about)
    text = (tmp_path / "report.md").read_text()
    assert "## What was to be shown" not in text and "nothing else to do" not in text
    assert "| low | 0.5 | full |" in text
