"""The laboratory's questions: numbered without a gap, and each with its family and video."""

import numpy as np
import pytest

from dycoke_core.model_frames import Spread
from dycoke_core.tiny.clip import FPS
from dycoke_core.tiny.questions import DESCRIBE, FAMILIES
from dycoke_core.tiny.scenes import SIZE
from loadtest.accuracy.clips import (
    BRIEF,
    DESCRIPTIONS,
    SHORT,
    QuestionSet,
    load_questions,
    sample_frames,
)


@pytest.fixture(scope="module")
def questions() -> QuestionSet:
    return load_questions(3)


def test_every_family_is_asked_about_as_often(questions: QuestionSet) -> None:
    assert np.bincount(questions.families).tolist() == [3] * len(FAMILIES)


def test_questions_are_numbered_in_order_with_their_family_and_video(
    questions: QuestionSet,
) -> None:
    asked = [(clip, question) for clip in questions.clips for question in clip.questions]
    assert [question.index for _, question in asked] == list(range(len(questions.families)))
    for clip, one in asked:
        assert FAMILIES[questions.families[one.index]] == one.question.family
        assert questions.videos[one.index] == clip.index
        assert one.max_tokens == (64 if one.question.family == DESCRIBE else 16)
        assert one.messages[0].content == one.question.text


def test_the_short_families_are_all_but_descriptions() -> None:
    assert sorted((*SHORT, *DESCRIPTIONS)) == list(range(len(FAMILIES)))
    assert set(BRIEF) <= set(SHORT)


def test_other_seeds_are_other_scenes(questions: QuestionSet) -> None:
    other = load_questions(3, first_seed=300_000)
    seeds = {clip.scene.seed for clip in questions.clips}
    assert not seeds & {clip.scene.seed for clip in other.clips}


@pytest.mark.parametrize("spread", ["floor", "nearest", "starts"])
def test_times_are_those_of_the_frames_that_are_sampled(
    questions: QuestionSet, spread: Spread
) -> None:
    clip = questions.clips[0]
    numbers = np.arange(clip.scene.num_frames)
    taken = sample_frames(numbers, 5, spread)
    timing = clip.timing(5, spread)
    assert timing.timestamps_s == tuple(number / FPS for number in taken.tolist())
    assert timing.duration_s == clip.scene.num_frames / FPS
    assert sample_frames(numbers, len(numbers), spread) is numbers


def test_frames_of_another_size_show_the_same(questions: QuestionSet) -> None:
    clip = questions.clips[0]
    own, half = clip.frames(SIZE), clip.frames(SIZE // 2)
    assert half.shape == (len(own), SIZE // 2, SIZE // 2, 3) and half.dtype == np.uint8
    assert abs(half.mean(axis=(1, 2)) - own.mean(axis=(1, 2))).max() < 1
