"""A small task, and lmms-eval's command line over it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dycoke_core.tiny.clip import write_video
from dycoke_core.tiny.questions import questions_about
from dycoke_core.tiny.render import render
from dycoke_core.tiny.scenes import sample_scene

MAX_TOKENS = 12

TASK = """
task: shapes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {max_tokens}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
"""

UTILS = """
def doc_to_visual(doc):
    return [doc["video"]]
"""

Doc = dict[str, str]

needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="runs in its own environment: make lmms-eval",
)


def make_docs(folder: Path) -> list[Doc]:
    """Questions about three scenes, encoded as files; those about a video are not together."""
    docs = []
    for seed in range(3):
        scene = sample_scene(seed, split="test")
        path = folder / f"{seed}.mp4"
        write_video(path, render(scene))
        for question in questions_about(scene)[:2]:
            docs.append({"video": str(path), "question": question.text, "answer": question.answer})
    return docs[::2] + docs[1::2]


def write_task(folder: Path, docs: list[Doc]) -> None:
    """As lmms-eval includes it."""
    folder.mkdir()
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "shapes.yaml").write_text(TASK.format(data=data, max_tokens=MAX_TOKENS))
    (folder / "utils.py").write_text(UTILS)


def run_lmms_eval(task: Path, model: str, model_args: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"HF_HOME": str(task / "hf"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [
            *(sys.executable, "-m", "lmms_eval", "--model", model),
            *("--model_args", model_args, "--tasks", "shapes", "--include_path", str(task)),
            *("--batch_size", "2", "--device", "cpu", "--log_samples"),
            *("--output_path", str(task / "out")),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def answers_of(task: Path) -> list[str]:
    """What it has logged, in the order of the questions."""
    (samples,) = (task / "out").rglob("*samples_shapes.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    answers = {sample["doc_id"]: sample["filtered_resps"] for sample in logged}
    return [answers[place] for place in range(len(answers))]
