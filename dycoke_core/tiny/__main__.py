"""Trains and evaluates the bundled model.

python -m dycoke_core.tiny train [DIRECTORY]     train it from scratch; run again to resume
python -m dycoke_core.tiny evaluate [CHECKPOINT] measure its accuracy on held-out scenes
python -m dycoke_core.tiny clip [FILE]           write the bundled clip
"""

import argparse
import sys
from pathlib import Path

from dycoke_core.tiny import CHECKPOINT, CLIP


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dycoke_core.tiny",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train(commands.add_parser("train"))
    _add_evaluate(commands.add_parser("evaluate"))
    clip = commands.add_parser("clip")
    clip.add_argument("file", type=Path, nargs="?", default=CLIP)
    clip.set_defaults(run=_write_clip)
    arguments = parser.parse_args()
    arguments.run(arguments)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, nargs="?", default=Path("tiny-run"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision-steps", type=int, default=600)
    parser.add_argument("--language-steps", type=int, default=2700)
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument(
        "--drop-tokens",
        action="store_true",
        help="train with random visual tokens missing, for comparison",
    )
    parser.set_defaults(run=_train)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--number", type=int, default=200, help="questions per family")
    parser.add_argument("--source", choices=("frames", "file"), default="frames")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.set_defaults(run=_evaluate)


def _train(arguments: argparse.Namespace) -> None:
    from dycoke_core.tiny.training.run import OtherPlanError, TrainingPlan, train

    plan = TrainingPlan(
        directory=arguments.directory,
        seed=arguments.seed,
        vision_steps=arguments.vision_steps,
        language_steps=arguments.language_steps,
        processes=arguments.processes,
        drops_tokens=arguments.drop_tokens,
    )
    try:
        train(plan)
    except OtherPlanError as error:
        sys.exit(f"error: {error}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from dycoke_core.tiny.figures import Evaluation, evaluate, table, write

    evaluation = Evaluation(
        checkpoint=arguments.checkpoint,
        number=arguments.number,
        source=arguments.source,
        processes=arguments.processes,
    )
    figures = evaluate(evaluation)
    print(table(figures))
    if arguments.json is not None:
        write(figures, arguments.json)


def _write_clip(arguments: argparse.Namespace) -> None:
    from dycoke_core.tiny.clip import write_clip

    write_clip(arguments.file)
    print(f"{arguments.file}: {arguments.file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
