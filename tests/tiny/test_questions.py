"""Questions have one right answer, which can be read off the pixels."""

from collections import Counter

import numpy as np

from dycoke_core.tiny.descriptions import describe
from dycoke_core.tiny.questions import (
    FAMILIES,
    PHRASINGS,
    SHORT_FAMILIES,
    Question,
    guess_about,
    questions_about,
)
from dycoke_core.tiny.render import render
from dycoke_core.tiny.scenes import COLORS, HELD_OUT, SHAPES, SIZE, sample_scene
from tests.tiny.seen import Sighting, look_at


class Witness:
    """Answers questions from what can be seen alone."""

    def __init__(self, sightings: list[Sighting], backgrounds: list[str]) -> None:
        self._backgrounds = backgrounds
        self._white = sorted(s.frame for s in sightings if s.color == "white")
        self._colored = [s for s in sightings if s.color != "white"]
        self._last_frame = len(backgrounds) - 1

    def _of(self, question: Question) -> list[Sighting]:
        """Sightings of what the question names, by its colour, or else its shape."""
        words = question.text.rstrip("?").split()
        found = [s for s in self._colored if s.color in words]
        return found or [s for s in self._colored if s.shape in words]

    def answer(self, question: Question) -> str:
        by_family = {
            "color": lambda: f"It is {self._of(question)[0].color}.",
            "end_color": lambda: f"It is {self._of(question)[-1].color}.",
            "shape": lambda: f"It is a {self._of(question)[0].shape}.",
            "direction": lambda: f"It moves {self._way(self._of(question))}.",
            "position": lambda: f"It is at the {self._place(self._of(question)[-1])}.",
            "number": self._number,
            "existence": lambda: self._existence(question),
            "first": lambda: self._by_first_frame()[0],
            "last": lambda: self._by_first_frame()[-1],
            "stationary": self._stationary,
            "action_count": self._blinks,
            "transition": self._transition,
            "brief_event": self._brief,
        }
        return by_family[question.family]()

    def _by_color(self) -> dict[str, list[Sighting]]:
        found: dict[str, list[Sighting]] = {}
        for sighting in self._colored:
            found.setdefault(sighting.color, []).append(sighting)
        return found

    def _way(self, path: list[Sighting]) -> str:
        x, y = path[-1].x - path[0].x, path[-1].y - path[0].y
        if max(abs(x), abs(y)) < 10:
            return "nowhere"
        if abs(x) > abs(y):
            return "right" if x > 0 else "left"
        return "down" if y > 0 else "up"

    def _place(self, sighting: Sighting) -> str:
        row = "top" if sighting.y < SIZE / 2 else "bottom"
        return f"{row} {'left' if sighting.x < SIZE / 2 else 'right'}"

    def _number(self) -> str:
        number = max(Counter(s.frame for s in self._colored).values())
        words = ("", "is one object", "are two objects", "are three objects")
        return f"There {words[number]}."

    def _existence(self, question: Question) -> str:
        words = question.text.rstrip("?").split()
        return "Yes." if any({s.color, s.shape} <= set(words) for s in self._colored) else "No."

    def _by_first_frame(self) -> list[str]:
        firsts = sorted((path[0] for path in self._by_color().values()), key=lambda s: s.frame)
        return [f"The {s.color} {s.shape}." for s in firsts]

    def _stationary(self) -> str:
        (still,) = [p[0] for p in self._by_color().values() if self._way(p) == "nowhere"]
        return f"The {still.color} {still.shape}."

    def _blinks(self) -> str:
        spells = sum(frame - 1 not in self._white for frame in self._white)
        return f"It blinks {('never', 'once', 'twice', 'three times')[spells]}."

    def _transition(self) -> str:
        before, after = self._backgrounds[0], self._backgrounds[-1]
        return f"It stays {before}." if before == after else f"It changes from {before} to {after}."

    def _brief(self) -> str:
        (brief,) = [path[0] for path in self._by_color().values() if len(path) <= 2]
        return f"The {brief.color} {brief.shape}."


def test_answers_can_be_read_off_the_pixels() -> None:
    families = Counter[str]()
    for seed in range(60):
        scene = sample_scene(
            seed, split=("train", "test")[seed % 2], num_frames=(16, 32)[seed % 3 > 0]
        )
        witness = Witness(*look_at(render(scene)))
        for question in questions_about(scene)[:-1]:
            assert witness.answer(question) == question.answer, (seed, question)
            families[question.family] += 1
    assert set(families) == set(SHORT_FAMILIES)
    assert min(families.values()) >= 5


def test_a_draw_changes_phrasings_and_not_answers() -> None:
    scene = sample_scene(11)
    assert questions_about(scene) == questions_about(scene)
    again = questions_about(scene, draw=1)
    assert [q.text for q in again] != [q.text for q in questions_about(scene)]
    assert again[-1].answer == describe(scene)


def test_training_never_speaks_of_a_held_out_pair() -> None:
    names = [f"{color} {shape}" for color, shape in HELD_OUT]
    for seed in range(300):
        for question in questions_about(sample_scene(seed, num_frames=8)):
            assert not any(name in question.text + question.answer for name in names)


def test_existence_is_as_often_denied_as_affirmed() -> None:
    asked = [
        q for s in range(100) for q in questions_about(sample_scene(s)) if q.family == "existence"
    ]
    assert Counter(q.answer for q in asked)["Yes."] * 2 == len(asked)


def test_guesses_ask_for_what_is_not_there_and_their_words_say_nothing_of_the_answer() -> None:
    rng = np.random.default_rng(0)
    pairs: Counter[tuple[str, str]] = Counter()
    for seed in range(3000):
        scene = sample_scene(seed, num_frames=8)
        question = guess_about(scene, rng)
        words = question.text.rstrip("?").split()
        shown = {w for t in scene.things for w in (t.color, t.shape, t.new_color)}
        (asked,) = {*COLORS, *SHAPES} & set(words)
        assert asked not in shown
        answered = question.answer.rstrip(".").split()[-1]
        pairs[(answered, asked) if answered in COLORS else (asked, answered)] += 1
    number = [pairs[color, shape] for color in COLORS for shape in SHAPES]
    assert min(number) > 0.6 * np.mean(number)
    assert max(number) < 1.5 * np.mean(number)


def test_every_family_has_several_phrasings() -> None:
    assert set(PHRASINGS) == set(FAMILIES)
    assert all(len(set(phrasings)) >= 2 for phrasings in PHRASINGS.values())
