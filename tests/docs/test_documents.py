"""Links lead somewhere, named files exist, commands are real, lines are short."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.documents import DOCUMENTS, ROOT, all_commands, prose_lines

MAX_LINE = 100
OUR_PACKAGES = ("app", "dycoke_core", "deploy", "loadtest", "tests")

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
    pattern = rf"`((?:{'|'.join(OUR_PACKAGES)}|docs|examples)/[\w./-]*)`"
    for name in re.findall(pattern, document.read_text()):
        assert (ROOT / name).exists() or any(ROOT.glob(f"{name}*")), f"there is no {name}"


@by_document
def test_lines_of_prose_end_at_a_hundred_characters(document: Path) -> None:
    too_long = [number for number, line in prose_lines(document) if len(line) > MAX_LINE]
    assert not too_long


def test_lines_of_redis_scripts_end_at_a_hundred_characters() -> None:
    for script in (ROOT / "app" / "store" / "lua").glob("*.lua"):
        lines = script.read_text().splitlines()
        too_long = [number for number, line in enumerate(lines, 1) if len(line) > MAX_LINE]
        assert not too_long, script.name


def test_make_targets_exist_and_help_names_them() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", text, flags=re.MULTILINE))
    documented = set(re.findall(r"^([a-z][\w-]*):.*?## ", text, flags=re.MULTILINE))
    assert targets == documented
    words = [shlex.split(command) for command in all_commands()]
    asked = {line[1] for line in words if line[0] == "make"}
    assert asked and asked <= targets


def test_modules_and_options_of_commands_exist() -> None:
    num_modules = 0
    for command in all_commands():
        words = shlex.split(command)
        for place, word in enumerate(words[:-1]):
            if word != "-m" or words[place + 1].split(".")[0] not in OUR_PACKAGES:
                continue
            num_modules += 1
            module = words[place + 1]
            spec = find_spec(module)
            assert spec is not None, f"{command}: there is no {module}"
            for option in (w.split("=")[0] for w in words[place + 2 :] if w.startswith("--")):
                assert knows_option(spec.origin, option), f"{command}: {module} knows no {option}"
    assert num_modules >= 5


def knows_option(origin: str | None, option: str) -> bool:
    assert origin is not None
    path = Path(origin)
    sources = path.parent.rglob("*.py") if path.name == "__init__.py" else [path]
    return any(f'"{option}"' in source.read_text() for source in sources)
