"""The project's Markdown: its files, their fenced blocks, their prose."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    ROOT / "loadtest" / "results" / "README.md",
]


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    document: Path
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """What follows a prompt, with its continuation lines."""
        joined = self.text.replace("\\\n", " ")
        # A quoted argument may continue over lines, too.
        found = re.findall(r"^\$ ((?:'[^']*'|[^'\n])*)", joined, flags=re.MULTILINE)
        return [command.split("   #")[0].strip() for command in found]


def blocks(document: Path) -> Iterator[Block]:
    pattern = r"^```(\w*)\n(.*?)^```$"
    for language, text in re.findall(pattern, document.read_text(), flags=re.M | re.S):
        yield Block(document, language, text)


def prose_lines(document: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, without fenced blocks and tables."""
    is_fenced = False
    for number, line in enumerate(document.read_text().splitlines(), start=1):
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif not is_fenced and not line.startswith("|"):
            yield number, line
