"""The real lmms-eval runs a small local task through the plugin: `make lmms-eval`.

lmms-eval has an environment of its own, so these tests are skipped in ours.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from dycoke_core.config import CompressionConfig, EngineConfig
from dycoke_core.engine import Engine, SamplingParams, Sequence
from dycoke_core.sequence import ChatMessage
from dycoke_core.tiny import CHECKPOINT
from dycoke_core.video import FrameSpec, read_video_frames
from tests.lmms_plugin.running import MAX_TOKENS, Doc, answers_of, needs_lmms_eval, run_lmms_eval

pytestmark = [needs_lmms_eval, pytest.mark.timeout(400)]

PLUGIN = "dycoke_llava_onevision"


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
    done = run_lmms_eval(task, PLUGIN, f"pretrained={CHECKPOINT},{arguments}")
    assert done.returncode == 0, done.stderr
    (results,) = (task / "out").rglob("*results.json")
    expected = expected_answers(docs, compression)
    assert answers_of(task) == [text.strip() for text in expected]
    assert 0 <= json.loads(results.read_text())["results"]["shapes"]["exact_match,none"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("dycoke=True,dycoke_k=2", "compression.k must be between 0 and 1"),
        ("conv_template=vicuna", "conv_template and model_name"),
    ],
)
def test_arguments_that_make_no_sense_end_the_run(arguments: str, message: str, task: Path) -> None:
    done = run_lmms_eval(task, PLUGIN, f"pretrained={CHECKPOINT},{arguments}")
    assert message in done.stdout + done.stderr
    assert not list((task / "out").rglob("*results.json"))
