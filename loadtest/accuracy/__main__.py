"""What compression costs in right answers.

    python -m loadtest.accuracy [--model DIR] [--n 200] [--tables table1 table5 ...] [--output DIR]
    python -m loadtest.accuracy --policies dycoke '{"policy": "vidcom2", "retained_ratio": 0.5}'

Asks a model the synthetic test set under every setting of the paper's tables: full tokens, DyCoke,
its controls, VidCom2, FastV, PruMerge. Takes any model that the service takes; FastV, PruMerge and
the picture of attention reach inside LLaVA-OneVision, and are left out for other families. Writes
accuracy.json, accuracy.md and pictures, and prints the Markdown.

Not covered: speed (`loadtest.engine`), video files, real videos.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import matplotlib
from tqdm import tqdm

from dycoke_core.engine import Engine
from dycoke_core.errors import DycokeError
from dycoke_core.model.adapter import VideoLanguageModel
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.tiny import CHECKPOINT
from dycoke_core.tiny.questions import DESCRIBE, PHRASINGS
from dycoke_core.tiny.scenes import Scene
from dycoke_core.tiny.testset import FIRST_SEED
from loadtest import machine
from loadtest.accuracy.charts import draw_charts
from loadtest.accuracy.clips import QuestionSet, load_questions
from loadtest.accuracy.evaluation import open_engine
from loadtest.accuracy.markdown import to_markdown
from loadtest.accuracy.pictures import draw_attention, draw_kept_tokens
from loadtest.accuracy.processes import ModelSource, evaluate
from loadtest.accuracy.report import make_report
from loadtest.accuracy.settings import (
    FULL,
    TABLES,
    Setting,
    Sizes,
    settings_named,
    settings_of,
    union,
)


def main() -> int:
    try:
        _run(_parse_arguments())
    except DycokeError as error:
        print(f"error: {error.code}: {error.message}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    matplotlib.use("Agg")
    measured_with = machine.describe()  # before this loads the machine
    source = ModelSource(arguments.model, arguments.device, arguments.dtype)
    model = source.load()
    tables, left_out = _tables(arguments, model)
    if left_out:
        print(f"left out for {model.architecture}: {', '.join(left_out)}", file=sys.stderr)
    questions = load_questions(arguments.n, first_seed=arguments.first_seed)
    settings = union(list(tables.values()))
    assert settings[0].name == FULL
    num_cores = os.cpu_count() or 1
    num_processes = arguments.processes or (num_cores if model.device.type == "cpu" else 1)
    engine = open_engine(model) if num_processes == 1 else None
    with tqdm(total=len(questions.clips), unit="video", disable=arguments.quiet) as bar:
        outcomes = evaluate(
            source,
            questions,
            settings,
            engine=engine,
            num_processes=num_processes,
            on_clips=bar.update,
        )
    measured_with["processes"] = num_processes
    report = make_report(model, questions, tables, outcomes, measured_with, left_out)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n")
    text = to_markdown(report)
    (arguments.output / "accuracy.md").write_text(text)
    draw_charts(report, arguments.output)
    _draw_one_answer(engine or open_engine(model), questions, arguments.output)
    print(text)


def _tables(
    arguments: argparse.Namespace, model: VideoLanguageModel
) -> tuple[dict[str, list[Setting]], list[str]]:
    """The tables, and the names of settings that are left out of them."""
    if arguments.policies:
        return {"policies": settings_named(arguments.policies)}, []
    sizes = Sizes.of(model)
    tables = {table: settings_of(table, sizes) for table in arguments.tables}
    has_baselines = isinstance(model, LlavaOnevision)
    if has_baselines and not arguments.no_baselines:
        return tables, []
    unwanted = [row.name for row in union(list(tables.values())) if row.method != "policy"]
    policies = {t: [row for row in rows if row.method == "policy"] for t, rows in tables.items()}
    return policies, [] if has_baselines else unwanted


def _draw_one_answer(engine: Engine, questions: QuestionSet, directory: Path) -> None:
    """Draws an answer about the first video in which something flashes, if there is one."""
    model = engine.model
    clip = next((c for c in questions.clips if c.scene.event == "flash"), questions.clips[0])
    frames, question = clip.frames(model.image_size), PHRASINGS[DESCRIBE][0]
    if isinstance(model, LlavaOnevision):
        draw_attention(model, frames, question, directory / "attention.png")
    draw_kept_tokens(
        engine,
        frames,
        clip.timing(len(frames), model.frame_spread),
        question,
        directory / "kept.png",
        first_frame=_window_of_flash(clip.scene),
    )


def _window_of_flash(scene: Scene) -> int:
    """First frame of the two windows around a flash."""
    starts = [thing.visible.start for thing in scene.things if thing.flashes]
    first = starts[0] // 4 * 4 if starts else 0
    return min(first, scene.num_frames - 8)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=str(CHECKPOINT), help="directory or hub id")
    parser.add_argument("--n", type=int, default=200, help="questions per family")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument(
        "--policies", nargs="+", metavar="POLICY", help="names or JSON objects, instead of tables"
    )
    parser.add_argument("--no-baselines", action="store_true", help="leave out FastV and PruMerge")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help="of the test scenes")
    parser.add_argument("--output", type=Path, default=Path("accuracy-report"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--processes", type=int, help="one per core of a CPU, else one")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
