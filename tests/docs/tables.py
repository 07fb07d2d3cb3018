"""The documents' tables, and what their cells say of the code."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from tests.docs.documents import ROOT

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Table:
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(document: str) -> Iterator[Table]:
    text = (ROOT / document).read_text()
    for lines in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        head, _, *rows = (
            tuple(cell.strip() for cell in line.strip("|").split(" | "))
            for line in lines.replace("| |", "|  |").splitlines()
        )
        assert all(len(row) == len(head) for row in rows), f"{document}: {head}"
        yield Table(head, tuple(rows))


def table(document: str, *head: str) -> Table:
    """The one table of the document whose first columns have these headings."""
    (found,) = (t for t in tables(document) if t.head[: len(head)] == head)
    return found


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def plain(cell: str) -> str:
    """Without the marks of code and links, and with the letter x for the multiplication sign."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell)
    return text.replace("`", "").replace("\N{MULTIPLICATION SIGN}", "x")


def defaults(names: Sequence[str], cell: str) -> Iterator[tuple[str, str]]:
    """Each name with the default that its cell gives; the last default holds for all names after
    it."""
    parts = plain(cell).split(", ", len(names) - 1)
    for place, name in enumerate(names):
        yield name, parts[min(place, len(parts) - 1)]


def assert_defaults(
    fields: Mapping[str, FieldInfo], said: Mapping[str, str], derived: Mapping[str, str]
) -> None:
    """Compares with the fields of a pydantic model.

    Args:
        derived: what to say of defaults that are not in the model, or not as a value.
    """
    for name, text in said.items():
        default = fields[name].get_default(call_default_factory=True)
        if name in derived:
            assert text == derived[name], name
        elif default is None or default in ([], (), ""):
            assert not re.search(r"\d", text), f"{name} has no default, not '{text}'"
        else:
            value = text.split(":")[0]
            assert _same(value, default), f"{name} is {default!r} by default, not '{text}'"


def _same(text: str, default: Any) -> bool:
    if isinstance(default, bool):
        return text == str(default).lower()
    if isinstance(default, int | float):
        number, _, unit = text.replace(",", "").partition(" ")
        is_number = re.fullmatch(r"-?\d+(\.\d+)?", number) and unit in ("", *_UNITS)
        return bool(is_number) and float(number) * _UNITS.get(unit, 1) == default
    return text == str(default)


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The words that a field takes; none where it takes other things."""
    is_literal = get_origin(field.annotation) is Literal
    return tuple(map(str, get_args(field.annotation))) if is_literal else ()


def words(document: Path | str) -> str:
    """The document's text with single spaces, so that a sentence is found over its line ends."""
    return " ".join((ROOT / document).read_text().split())
