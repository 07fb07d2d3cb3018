"""Documents that list what the code has."""

from deploy.reference import OUTPUT, reference
from tests.docs.documents import ROOT


def test_the_reference_is_up_to_date() -> None:
    assert OUTPUT.read_text() == reference(), "run `make dashboards`"


def test_the_architecture_names_files_for_every_step_and_question() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    life = text.split("## The life of a request")[1].split("\n## ")[0]
    steps = [step for step in life.split("\n\n")[1].split("\n") if step[:1].isdigit()]
    assert 5 <= len(steps) <= 10
    index = text.split("## Where is …?")[1]
    rows = [line for line in index.splitlines() if line.startswith("| W")]
    assert len(rows) >= 10 and all("`" in row for row in rows)
