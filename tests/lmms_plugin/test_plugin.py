"""The real lmms-eval runs a small local task through the plugin: `make lmms-eval`.

lmms-eval has an environment of its own, so these tests are skipped in ours.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from dycoke_core.config import CompressionConfig, EngineConfig
from dycoke_core.engine import Engine, SamplingParams, Sequence
from dycoke_core.sequence import ChatMessage, FrameTiming
from dycoke_core.tiny import CHECKPOINT
from dycoke_core.video import FrameSpec, read_video_frames
from tests.lmms_plugin.running import MAX_TOKENS, Doc, answers_of, needs_lmms_eval, run_lmms_eval
from tests.random_gemma import build_random_gemma3
from tests.random_qwen import build_random_qwen2_5_vl, build_random_qwen3_vl

pytestmark = [needs_lmms_eval, pytest.mark.timeout(400)]

PLUGIN, RELEASED_CODES_NAME = "dycoke", "dycoke_llava_onevision"
FAMILIES = {
    "gemma3": build_random_gemma3,
    "qwen2_5_vl": build_random_qwen2_5_vl,
    "qwen3_vl": build_random_qwen3_vl,
}
NUM_FRAMES = 5  # an odd number: a last unit of two frames repeats one


def expected_answers(
    docs: list[Doc],
    compression: str | dict[str, Any],
    checkpoint: Path = CHECKPOINT,
    num_frames: int = 32,
) -> list[str]:
    """The same questions, asked of the engine one by one."""
    engine = Engine.from_pretrained(checkpoint, EngineConfig(device="cpu"))
    texts = []
    for doc in docs:
        card = engine.card
        spec = FrameSpec(
            num_frames,
            card.frame_size(num_frames),
            spread=card.frame_spread,
            resizing=card.frame_resizing,
        )
        video = read_video_frames(Path(doc["video"]), spec)
        sequence = Sequence(
            sequence_id="a",
            messages=(ChatMessage("user", doc["question"]),),
            frames=video.pixels,
            timing=FrameTiming.shown_at(video.timestamps_s, video.shown_s),
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
    done = run_lmms_eval(task, RELEASED_CODES_NAME, f"pretrained={CHECKPOINT},{arguments}")
    assert done.returncode == 0, done.stderr
    (results,) = (task / "out").rglob("*results.json")
    expected = expected_answers(docs, compression)
    assert answers_of(task) == [text.strip() for text in expected]
    assert 0 <= json.loads(results.read_text())["results"]["shapes"]["exact_match,none"] <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_answers_as_its_engine_does(
    family: str, task: Path, docs: list[Doc], tmp_path: Path
) -> None:
    checkpoint = tmp_path / family
    FAMILIES[family](checkpoint)
    arguments = f"pretrained={checkpoint},dycoke=True,max_frames_num={NUM_FRAMES}"
    done = run_lmms_eval(task, PLUGIN, arguments)
    assert done.returncode == 0, done.stderr
    expected = expected_answers(docs, "dycoke", checkpoint, NUM_FRAMES)
    assert answers_of(task) == [text.strip() for text in expected]
    assert all(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("dycoke=True,dycoke_k=2", "compression.k must be between 0 and 1"),
        ("conv_template=vicuna", "conv_template must be 'qwen_1_5'"),
    ],
)
def test_arguments_that_make_no_sense_end_the_run(arguments: str, message: str, task: Path) -> None:
    done = run_lmms_eval(task, RELEASED_CODES_NAME, f"pretrained={CHECKPOINT},{arguments}")
    assert message in done.stdout + done.stderr
    assert not list((task / "out").rglob("*results.json"))
