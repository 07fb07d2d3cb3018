"""The fixed test set: questions about scenes that training cannot have seen, and their scores.

A scene brings at most one question of a family, so that within a family right and wrong answers are
independent of each other; questions of several families share a scene, which is encoded once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dycoke_core.tiny.descriptions import share_of_facts
from dycoke_core.tiny.questions import DESCRIBE, FAMILIES, Question, questions_about
from dycoke_core.tiny.scenes import Event, Scene, sample_scene

MAX_TOKENS = dict.fromkeys(FAMILIES, 16) | {DESCRIBE: 64}

_EVENTS: tuple[Event, ...] = ("order", "blink", "change", "flash")  # in turn


@dataclass(frozen=True, slots=True, eq=False)
class ExamScene:
    """A scene of the test split, and what is asked about it: one question of a family at most."""

    scene: Scene
    questions: tuple[Question, ...]


def test_set(
    number: int,
    *,
    families: Sequence[str] = FAMILIES,
    first_seed: int = 0,
    num_frames: int = 32,
) -> list[ExamScene]:
    """As many scenes as it takes to ask `number` questions of each family.

    The same arguments give the same set; one of fewer questions is a beginning of each family's.
    """
    missing = dict.fromkeys(families, number)
    exam: list[ExamScene] = []
    seed = first_seed
    while any(missing.values()):
        event = _EVENTS[seed % len(_EVENTS)]
        scene = sample_scene(seed, split="test", num_frames=num_frames, event=event)
        chosen: dict[str, Question] = {}
        asked = questions_about(scene)
        for question in asked[seed % len(asked) :] + asked[: seed % len(asked)]:
            if missing.get(question.family):
                chosen.setdefault(question.family, question)
        for family in chosen:
            missing[family] -= 1
        if chosen:
            exam.append(ExamScene(scene, tuple(chosen.values())))
        seed += 1
    return exam


test_set.__test__ = False  # type: ignore[attr-defined]  # a name that pytest would collect


def score(question: Question, answer: str) -> float:
    """1 or 0 for a short answer; for a description, how much of the facts it gets right."""
    if question.family == DESCRIBE:
        return share_of_facts(answer, question.answer)
    return float(question.is_answered_by(answer))
