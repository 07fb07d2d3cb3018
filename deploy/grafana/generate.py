"""Writes the dashboards' JSON: `make dashboards`. A test fails if it is not up to date."""

import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.boards import compression, service, workers

FOLDER = Path(__file__).parent / "dashboards"
BOARDS = (service.BOARD, compression.BOARD, workers.BOARD)


def dashboards() -> dict[str, str]:
    """File name to content."""
    encoder = JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False)
    return {f"{board.uid}.json": encoder.encode(board.build().build()) + "\n" for board in BOARDS}


def main() -> int:
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text)
        print(FOLDER / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
