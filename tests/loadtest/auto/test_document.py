"""The document has the tables of the committed results."""

from pathlib import Path

from loadtest.auto.document import BEGIN, DOCUMENT, END, RESULTS, updated
from loadtest.auto.report import write_report
from tests.loadtest.auto.canned import PHASE_S, PHASES
from tests.loadtest.auto.test_report import ABOUT, comparison

TEXT = f"# Before\n\n{BEGIN}\nold\n\n{END}\nafter\n"


def test_benchmarks_are_up_to_date() -> None:
    text = DOCUMENT.read_text()
    assert BEGIN in text and END in text
    assert updated(text, RESULTS) == text, "run `python -m loadtest.auto.document`"


def test_table_has_the_settings_side_by_side(tmp_path: Path) -> None:
    profile = {
        "phases": [{"name": phase.name, "share": phase.share} for phase in PHASES],
        "phase_s": PHASE_S,
        "num_turns": 1,
    }
    write_report(tmp_path / "auto", comparison(), ABOUT | {"profile": profile})
    text = updated(TEXT, tmp_path)
    assert "old" not in text and text.startswith("# Before\n") and text.endswith(f"{END}\nafter\n")
    assert "| phase | load | goodput, full / auto | right answers | TTFT p50 s | p95 s |" in text
    assert "| high | 2 | 0% / 50% | 1.000 / 1.000 | 4.00 / 0.50 | 4.00 / 0.50 | +0.500 [" in text
    assert "| whole profile |  | 33% / 67% |" in text and "dycoke k=0.9 50%, full 50% |" in text
    assert max(len(line) for line in text.splitlines() if line[:1] != "|") <= 100
    assert updated(text, tmp_path) == text


def test_results_that_are_not_there_leave_nothing(tmp_path: Path) -> None:
    assert updated(TEXT, tmp_path) == f"# Before\n\n{BEGIN}{END}\nafter\n"
