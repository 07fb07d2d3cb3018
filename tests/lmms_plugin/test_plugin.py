"""The real lmms-eval runs a small local task through the plugin: `make lmms-eval`.

lmms-eval has an environment of its own, so these tests are skipped in ours.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dycoke_core.config import CompressionConfig, EngineConfig
from dycoke_core.engine import Engine, SamplingParams, Sequence
from dycoke_core.sequence import ChatMessage
from dycoke_core.tiny import CHECKPOINT
from dycoke_core.tiny.clip import write_video
from dycoke_core.tiny.questions import questions_about
from dycoke_core.tiny.render import render
from dycoke_core.tiny.scenes import sample_scene
from dycoke_core.video import FrameSpec, read_video_frames

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("lmms_eval") is None,
        reason="runs in its own environment: make lmms-eval",
    ),
    pytest.mark.timeout(400),
]

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


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> list[Doc]:
    """Questions about three scenes, encoded as files; those about a video are not together."""
    directory = tmp_path_factory.mktemp("videos")
    docs = []
    for seed in range(3):
        scene = sample_scene(seed, split="test")
        path = directory / f"{seed}.mp4"
        write_video(path, render(scene))
        for question in questions_about(scene)[:2]:
            docs.append({"video": str(path), "question": question.text, "answer": question.answer})
    return docs[::2] + docs[1::2]


@pytest.fixture
def task(docs: list[Doc], tmp_path: Path) -> Path:
    """A folder with the task, as lmms-eval includes it."""
    directory = tmp_path / "task"
    directory.mkdir()
    data = directory / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (directory / "shapes.yaml").write_text(TASK.format(data=data, max_tokens=MAX_TOKENS))
    (directory / "utils.py").write_text(UTILS)
    return directory


def run_lmms_eval(task: Path, model_args: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"HF_HOME": str(task / "hf"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [
            *(sys.executable, "-m", "lmms_eval", "--model", "dycoke_llava_onevision"),
            *("--model_args", model_args, "--tasks", "shapes", "--include_path", str(task)),
            *("--batch_size", "2", "--device", "cpu", "--log_samples"),
            *("--output_path", str(task / "out")),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def expected_answers(docs: list[Doc], compression: str | dict[str, Any]) -> list[str]:
    """The same questions, asked of the engine one by one."""
    engine = Engine.from_pretrained(CHECKPOINT, EngineConfig(device="cpu"))
    texts = []
    for doc in docs:
        spec = FrameSpec(32, engine.card.image_size)
        sequence = Sequence(
            sequence_id="a",
            messages=(ChatMessage("user", doc["question"]),),
            frames=read_video_frames(Path(doc["video"]), spec).pixels,
            sampling=SamplingParams(max_tokens=MAX_TOKENS),
            compression=CompressionConfig.parse(compression),
        )
        engine.add(sequence)
        while engine.has_work:
            for event in engine.step():
                if event.report is not None:
                    texts.append(event.report.text)
    return texts


@pytest.mark.parametrize(
    ("arguments", "compression"),
    [
        ("dycoke=True,dycoke_l=3,dycoke_p=0.7,dycoke_k=0.7", "dycoke"),
        ("conv_template=qwen_1_5,model_name=llava_qwen", "full"),
    ],
)
def test_a_task_gets_the_engines_answers(
    arguments: str, compression: str | dict[str, Any], task: Path, docs: list[Doc]
) -> None:
    done = run_lmms_eval(task, f"pretrained={CHECKPOINT},{arguments}")
    assert done.returncode == 0, done.stderr
    (results,) = (task / "out").rglob("*results.json")
    (samples,) = (task / "out").rglob("*samples_shapes.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    answers = {sample["doc_id"]: sample["filtered_resps"] for sample in logged}
    expected = expected_answers(docs, compression)
    assert [answers[place] for place in range(len(docs))] == [text.strip() for text in expected]
    assert 0 <= json.loads(results.read_text())["results"]["shapes"]["exact_match,none"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("dycoke=True,dycoke_k=2", "compression.k must be between 0 and 1"),
        ("conv_template=vicuna", "conv_template and model_name"),
    ],
)
def test_arguments_that_make_no_sense_end_the_run(arguments: str, message: str, task: Path) -> None:
    done = run_lmms_eval(task, f"pretrained={CHECKPOINT},{arguments}")
    assert message in done.stdout + done.stderr
    assert not list((task / "out").rglob("*results.json"))
