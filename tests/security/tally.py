"""What was tried, how often, what got through: by the rows of SECURITY.md's table."""

import json
from dataclasses import dataclass, field
from pathlib import Path

VARIABLE = "SECURITY_TALLY"  # where the counts of a run go; read by `python -m tests.security`


@dataclass
class Tally:
    tried: dict[str, int] = field(default_factory=dict)
    through: dict[str, list[str]] = field(default_factory=dict)

    def count(self, row: str, through: str | None = None) -> None:
        """One attempt; `through` says what came of it that must not have."""
        self.tried[row] = self.tried.get(row, 0) + 1
        if through is not None:
            self.through.setdefault(row, []).append(through)

    def check(self, row: str) -> None:
        """Fails if anything got through, or nothing was tried."""
        assert self.tried.get(row), f"nothing was tried of: {row}"
        found = self.through.get(row, [])
        assert not found, f"{len(found)} of {self.tried[row]}:\n" + "\n".join(
            sorted(set(found))[:60]
        )

    def write(self, path: Path) -> None:
        path.write_text(
            json.dumps({row: [n, len(self.through.get(row, []))] for row, n in self.tried.items()})
        )


def table(path: Path) -> str:
    """The Markdown of a run."""
    rows = json.loads(path.read_text()).items()
    lines = [f"| {row} | {tried:,} | {through} |" for row, (tried, through) in rows]
    return "\n".join(["| tried | times | got through |", "|---|---|---|", *lines])
