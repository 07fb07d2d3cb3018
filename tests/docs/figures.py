"""Figures of committed runs as the documents write them, and the figures of a text with no run."""

import json
import re
from collections.abc import Iterable
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from tests.docs.documents import ROOT

RESULTS = ROOT / "loadtest" / "results"


def run(name: str) -> dict[str, Any]:
    """The content of a committed JSON file, by its path under `loadtest/results`."""
    content: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return content


def rounded(value: float, digits: int) -> str:
    """Halves go up, as a reader of the JSON's shortest decimals would round them."""
    step = Decimal(1).scaleb(-digits)
    exact = Decimal(repr(round(value, 9))).quantize(step, rounding=ROUND_HALF_UP)
    return f"{exact:,}"


def share(value: float, digits: int = 3) -> str:
    """Without the zero before the point: .967; 1.00 stays."""
    text = rounded(abs(value), digits if abs(value) < 1 else 2).removeprefix("0")
    return ("-" if value < 0 else "") + text


def signed(value: float, digits: int = 3) -> str:
    return ("" if value < 0 else "+") + share(value, digits)


def percent(value: float) -> str:
    return f"{rounded(100 * value, 0)} %"


def section(document: str, heading: str) -> str:
    """What stands under a heading, as one line, without its fenced blocks and tables."""
    text = f"\n{(ROOT / document).read_text()}".split(f"\n{heading}\n")[1]
    text = re.sub(r"```.*?```|^\|.*?$", "", text, flags=re.MULTILINE | re.DOTALL)
    return " ".join(re.split(r"^#+ ", text, maxsplit=1, flags=re.MULTILINE)[0].split())


def figures_without_data(text: str, said: Iterable[str]) -> list[str]:
    """The figures of a text that are in none of the phrases.

    Args:
        said: what the data say, each somewhere in the text.
    """
    for phrase in sorted(said, key=len, reverse=True):
        assert phrase in text, f"the data say: {phrase}"
        text = text.replace(phrase, " ")
    text = re.sub(r"`[^`]*`|\[[^]]*\]\([^)]*\)", "", text)
    return re.findall(r"(?<![\w./-])-?(?:\d{1,3}(?:,\d{3})+|\d*\.?\d+)(?![\w/])", text)
