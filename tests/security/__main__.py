"""Runs the review and prints its table: `python -m tests.security [--full]`."""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.security import scale, tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.security", description=__doc__)
    parser.add_argument("--full", action="store_true", help="for ten minutes or so instead of two")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "tally.json"
        environment = {**os.environ, tally.VARIABLE: str(counts)}
        if arguments.full:
            environment[scale.VARIABLE] = "1"
        command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent)]
        done = subprocess.run(command, env=environment)
        if counts.exists():
            print(tally.table(counts))
        return done.returncode


if __name__ == "__main__":
    sys.exit(main())
