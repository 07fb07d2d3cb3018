"""The fixed test set: questions about scenes that training cannot have seen, and their scores.

A scene has at most one question of a family, so within a family answers are independent of each
other; questions of several families share a scene, which is encoded once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dycoke_core.tiny.descriptions import share_of_facts
from dycoke_core.tiny.questions import DESCRIBE, FAMILIES, Question, questions_about
from dycoke_core.tiny.scenes import Event, Scene, sample_scene

FIRST_SEED = 200_000  # scenes below were looked at while model and recipe were made
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
    first_seed: int = FIRST_SEED,
    num_frames: int = 32,
) -> list[ExamScene]:
    """As many scenes as it takes to ask `number` questions of each family.

    The same arguments give the same set; a smaller set has the first questions of each family.
    """
    missing = dict.fromkeys(families, number)
    exam: list[ExamScene] = []
    seed = first_seed
    while any(missing.values()):
        turn, place = divmod(seed, len(_EVENTS))
        scene = sample_scene(seed, split="test", num_frames=num_frames, event=_EVENTS[place])
        asked: dict[str, list[Question]] = {}
        for question in questions_about(scene):
            if missing.get(question.family):
                asked.setdefault(question.family, []).append(question)
        chosen = [candidates[turn % len(candidates)] for candidates in asked.values()]
        for question in chosen:
            missing[question.family] -= 1
        if chosen:
            exam.append(ExamScene(scene, tuple(chosen)))
        seed += 1
    return exam


test_set.__test__ = False  # type: ignore[attr-defined]  # a name that pytest would collect


def score(question: Question, answer: str) -> float:
    """1 or 0 for a short answer; for a description, how much of the facts it gets right."""
    if question.family == DESCRIBE:
        return share_of_facts(answer, question.answer)
    return float(question.is_answered_by(answer))
