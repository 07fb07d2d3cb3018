"""The chaos suite: `python -m tests.chaos [--seed N] [--minutes M] [--embedded]`; exits with 1 if
anything broke that should not.

Two APIs, two pools of workers with fake engines and a Redis are killed, paused, drained and cut off
from one another while clients ask, leave, resume and retry. Then every answer must be whole, every
job ended once, and nothing left over. `--embedded` does the same to `python -m app serve`.
"""

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.report import report
from tests.chaos.run import Run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--embedded", action="store_true")
    args = parser.parse_args()
    seed = random.randrange(10**6) if args.seed is None else args.seed
    name = f"chaos{' --embedded' * args.embedded} --seed {seed}"
    print(f"{name}: {args.minutes:g} minutes", flush=True)
    # A unix socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="dycoke-chaos-"))
    run = _kind(is_embedded=args.embedded)(folder, seed=seed, duration_s=60 * args.minutes)
    has_held = False
    try:
        has_held = asyncio.run(run())
    finally:
        print(report(run.ledger, name=name, logs=run.logs), flush=True)
        if has_held:
            shutil.rmtree(folder)
        else:
            print(f"again: python -m tests.{name}; logs: {folder}", flush=True)
    return 0 if has_held else 1


def _kind(*, is_embedded: bool) -> type:
    if not is_embedded:
        return Run
    from tests.chaos.embedded import EmbeddedRun  # which imports torch

    return EmbeddedRun


if __name__ == "__main__":
    sys.exit(main())
