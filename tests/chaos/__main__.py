"""The chaos suite: `python -m tests.chaos [--seed N] [--minutes M]`; exits with 1 if anything broke
that should not.

Two APIs, two pools of workers with fake engines and a Redis are killed, paused, drained and cut off
from one another while clients ask, leave, resume and retry. Then every answer must be whole, every
job ended once, and nothing left over.
"""

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.run import Run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=5.0)
    args = parser.parse_args()
    seed = random.randrange(10**6) if args.seed is None else args.seed
    print(f"chaos: seed {seed}, {args.minutes:g} minutes", flush=True)
    # A unix socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="dycoke-chaos-"))
    run = Run(folder, seed=seed, duration_s=60 * args.minutes)
    try:
        has_held = asyncio.run(run())
    finally:
        print(run.report(), flush=True)
    if not has_held:
        print(f"again: CHAOS_SEED={seed} make chaos; logs: {folder}", flush=True)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
