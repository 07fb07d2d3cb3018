"""The test set: balanced, without a shortcut, and the same in every size."""

from collections import Counter

from dycoke_core.tiny.questions import (
    FAMILIES,
)
from dycoke_core.tiny.testset import test_set


def test_the_test_set_asks_as_often_in_each_family_and_once_per_scene() -> None:
    exam = test_set(5, num_frames=8)
    families = Counter(q.family for item in exam for q in item.questions)
    assert families == dict.fromkeys(FAMILIES, 5)
    for item in exam:
        assert item.scene.split == "test"
        assert len({q.family for q in item.questions}) == len(item.questions)


def test_no_answer_of_the_test_set_is_right_more_often_than_chance_allows() -> None:
    answers: dict[str, Counter[str]] = {}
    for item in test_set(60, num_frames=8):
        for question in item.questions:
            answers.setdefault(question.family, Counter())[question.answer] += 1
    commonest = {family: max(counts.values()) / 60 for family, counts in answers.items()}
    assert commonest["existence"] <= 0.6
    assert all(share <= 0.6 for share in commonest.values()), commonest


def test_a_smaller_test_set_is_a_part_of_a_larger_one() -> None:
    def asked(number: int) -> set[tuple[int, str, str]]:
        exam = test_set(number, num_frames=8)
        return {(i.scene.seed, q.family, q.text) for i in exam for q in i.questions}

    assert asked(3) < asked(6)
