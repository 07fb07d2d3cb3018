"""The whole command against a real service with the bundled model."""

import csv
import json
from pathlib import Path

import pytest

from loadtest import compare


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_auto_is_measured_through_the_whole_service(tmp_path: Path) -> None:
    """One setting, phases of a moment, and an objective that any machine meets."""
    options = "--settings auto --turns 1 --phase 0.5 --videos 3 --capacity 2 --objective 300"
    assert compare.main(["--auto", *options.split(), "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    whole = content["figures"][-1]
    assert (whole["phase"], whole["setting"]) == ("whole profile", "auto")
    with (tmp_path / "answers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == whole["num_asked"] > 10, "the burst alone has 10"
    assert whole["num_refused"] == whole["num_failed"] == 0
    assert whole["levels"] == {"full": 1.0}, "the objective asks for no compression"
    assert whole["accuracy"] > 0.8
    assert whole["good"]["value"] == pytest.approx(whole["accuracy"])
    assert {row["reason"] for row in rows} <= {"objective", "cached", "steady"}
    assert any(row["prefix"] == "hit" for row in rows)
    assert content["argv"][0] == "--auto" and content["calibration"]["capacity_per_s"] == 2


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--phase 0", "above 0"),
        ("--turns 0", "at least 1"),
        ("--objective inf", "above 0"),
        ("--settings full no_such", "no_such"),
        ('--settings {"policy":"dycoke","k":2}', "k"),
        ("--settings {", "{"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(
    option: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        compare.main(["--auto", *option.split()])
    assert raised.value.code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
