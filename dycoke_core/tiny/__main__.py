"""`python -m dycoke_core.tiny train [DIRECTORY]`: trains the bundled model from scratch."""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dycoke_core.tiny")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train(commands.add_parser("train", help="train the bundled model; run again to resume"))
    arguments = parser.parse_args()
    arguments.run(arguments)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, nargs="?", default=Path("tiny-run"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision-steps", type=int, default=900)
    parser.add_argument("--language-steps", type=int, default=3000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--control", action="store_true", help="never drop visual tokens, for comparison"
    )
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> None:
    from dycoke_core.tiny.training.run import TrainingPlan, train

    train(
        TrainingPlan(
            directory=arguments.directory,
            seed=arguments.seed,
            vision_steps=arguments.vision_steps,
            language_steps=arguments.language_steps,
            processes=arguments.processes,
            drops_tokens=not arguments.control,
        )
    )


if __name__ == "__main__":
    main()
