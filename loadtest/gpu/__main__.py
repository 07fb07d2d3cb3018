"""Every figure that a GPU must show, in one command.

    python -m loadtest.gpu --out DIR [--minutes 8] [--only SECTION ...] [--dry-run]

Random weights of LLaVA-OneVision-7B's and 0.5B's geometry, 32 frames. Writes DIR/report.json and
DIR/report.md after every figure. Exit status: 0, all sections ran; 1, one failed; 2, no GPU.
--dry-run walks through all sections at toy size on the CPU.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # Triton reads these when imported
    os.environ["TRITON_INTERPRET"] = "1" if "--dry-run" in sys.argv else "0"
    if "--dry-run" in sys.argv:
        os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"

import torch

from loadtest import machine
from loadtest.gpu import runner
from loadtest.gpu.kit import Kit, Section
from loadtest.gpu.report import Report
from loadtest.gpu.sections import SECTIONS


def main() -> int:
    arguments = _parse()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("no CUDA device: nothing to measure (--dry-run needs none)", file=sys.stderr)
        return 2
    chosen = [s for s in SECTIONS if not arguments.only or s.name in arguments.only]
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = Report(arguments.out, is_dry=arguments.dry_run)
    seconds = arguments.minutes * 60
    if arguments.child:
        report.load()
        return 0 if runner.run_here(Kit.create(report), chosen, seconds) else runner.LOST_DEVICE
    report.machine = machine.describe()
    report.save()
    if arguments.dry_run:
        runner.run_here(Kit.create(report), chosen, seconds)
    else:
        runner.run_in_processes(report, chosen, seconds, _spawn(report))
    return _conclude(report, chosen)


def _spawn(report: Report) -> runner.Spawn:
    return lambda sections, seconds: runner.spawn_child(report, sections, seconds)


def _conclude(report: Report, sections: Sequence[Section]) -> int:
    print()
    print(report.markdown().split("\n## ")[0])
    failed = [s.name for s in sections if report.sections[s.name].status == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}; see {report.directory / 'report.md'}")
    return 1 if failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all sections together")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="SECTION",
        choices=[section.name for section in SECTIONS],
        help=", ".join(section.name for section in SECTIONS),
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
