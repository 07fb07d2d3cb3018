"""Links lead somewhere, named files exist, commands are real, lines are short."""

import re
from pathlib import Path

import pytest

from tests.docs.commands import OUR_PACKAGES
from tests.docs.documents import DOCUMENTS, ROOT, prose_lines

MAX_LINE = 100

by_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS]
)


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@by_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(path), f"{name} has no heading {anchor}"


@by_document
def test_files_that_are_named_exist(document: Path) -> None:
    pattern = rf"`((?:{'|'.join(OUR_PACKAGES)}|docs|examples)/[\w./*-]*)`"
    for name in re.findall(pattern, document.read_text()):
        assert any(ROOT.glob(name.rstrip("/"))), f"there is no {name}"


@by_document
def test_lines_of_prose_end_at_a_hundred_characters(document: Path) -> None:
    too_long = [number for number, line in prose_lines(document) if len(line) > MAX_LINE]
    assert not too_long


def test_lines_of_redis_scripts_end_at_a_hundred_characters() -> None:
    for script in (ROOT / "app" / "store" / "lua").glob("*.lua"):
        lines = script.read_text().splitlines()
        too_long = [number for number, line in enumerate(lines, 1) if len(line) > MAX_LINE]
        assert not too_long, script.name
