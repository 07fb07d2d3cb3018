"""The regression gate: the bundled model answers as well as the figures beside it say.

A change of the engine, the compression or the checkpoint that costs accuracy fails here. The test
set is the beginning of the one that the figures were taken on. Decoding is greedy, so the same
questions get the same scores, except for a few that another machine's rounding may change.
"""

import json
from pathlib import Path

import pytest
import torch

import dycoke_core.tiny
from dycoke_core.config import EngineConfig
from dycoke_core.engine import Engine
from dycoke_core.tiny import CHECKPOINT, CLIP, FIGURES
from dycoke_core.tiny.clip import clip_scene
from dycoke_core.tiny.evaluation import Answer, accuracies, answers, ask, wilson_interval
from dycoke_core.tiny.figures import NUM_FIRST, POLICIES, first_scores
from dycoke_core.tiny.questions import FAMILIES, questions_about
from dycoke_core.tiny.scenes import SIZE
from dycoke_core.tiny.testset import test_set
from dycoke_core.video import FrameSpec, read_video_frames

MOST_CHANGED = 5  # of 84 questions
MOST_CHANGED_IN_A_FAMILY = 2  # of 6


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.set_num_threads(1)
    return Engine.from_pretrained(CHECKPOINT, EngineConfig(device="cpu"))


@pytest.fixture(scope="module")
def found(engine: Engine) -> list[Answer]:
    exam = test_set(NUM_FIRST)
    return [answer for item in answers(engine, exam, POLICIES) for answer in item]


def test_it_is_small_but_deep_enough_for_both_stages(engine: Engine) -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 10 * 2**20
    geometry = engine.model.text_geometry
    assert geometry.num_layers >= 6
    assert geometry.num_heads > geometry.num_kv_heads


@pytest.mark.slow
@pytest.mark.parametrize("policy", range(len(POLICIES)), ids=POLICIES)
def test_accuracy_is_what_the_figures_say(policy: int, found: list[Answer]) -> None:
    """In the mean over all questions: the committed figure lies in the interval found here."""
    figures = json.loads(FIGURES.read_text())["policies"][POLICIES[policy]]["families"]
    by_family = accuracies(found, policy)
    mean = sum(by_family.values()) / len(FAMILIES)
    expected = sum(figures.values()) / len(FAMILIES)
    low, high = wilson_interval(mean, NUM_FIRST * len(FAMILIES), z=2.6)
    assert low <= expected <= high, by_family


@pytest.mark.slow
@pytest.mark.parametrize("policy", range(len(POLICIES)), ids=POLICIES)
def test_the_same_questions_are_answered_as_well_as_before(
    policy: int, found: list[Answer]
) -> None:
    before = json.loads(FIGURES.read_text())["policies"][POLICIES[policy]]["first_scores"]
    scores = first_scores(found, policy)
    changed = {
        family: sum(abs(a - b) for a, b in zip(scores[family], before[family], strict=True))
        for family in FAMILIES
    }
    assert max(changed.values()) <= MOST_CHANGED_IN_A_FAMILY, changed
    assert sum(changed.values()) <= MOST_CHANGED, changed


@pytest.mark.slow
def test_it_answers_the_bundled_clip_as_the_clip_is(engine: Engine) -> None:
    frames = read_video_frames(CLIP, FrameSpec(num_frames=32, image_size=SIZE)).pixels
    right = 0
    questions = questions_about(clip_scene())[:-1]
    for question in questions:
        right += question.is_answered_by(ask(engine, frames, question, "full"))
    assert right >= 0.75 * len(questions)


def test_its_files_come_with_the_package() -> None:
    package = Path(dycoke_core.tiny.__file__).parent
    for path in (CHECKPOINT, CLIP, FIGURES):
        assert path.exists() and path.is_relative_to(package)
