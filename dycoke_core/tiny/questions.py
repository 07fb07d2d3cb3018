"""Questions about a scene, each with one right answer.

The short families mirror MVBench's tasks, in words of the synthetic world; `describe` asks for the
whole scene in 20 to 60 tokens (`dycoke_core.tiny.descriptions`). A question is asked only where its
answer is beyond doubt: "What color is the circle?" needs a single circle that keeps its colour.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from dycoke_core.tiny.descriptions import TIMES, count_sentence, describe
from dycoke_core.tiny.scenes import COLORS, HELD_OUT, SHAPES, SIZE, Scene, Thing

SHORT_FAMILIES = (
    "color",
    "shape",
    "direction",
    "number",
    "existence",
    "first",
    "last",
    "end_color",
    "stationary",
    "action_count",
    "transition",
    "position",
    "brief_event",
)
DESCRIBE = "describe"
FAMILIES = (*SHORT_FAMILIES, DESCRIBE)
GUESS = "guess"  # only in training: questions that the video does not answer

_MARGIN = 18  # pixels: least distance from the picture's middle lines if a place is asked for
_QUESTION_KEY = 4

PHRASINGS: dict[str, tuple[str, ...]] = {
    "color": (
        "What color is the {shape}?",
        "What is the color of the {shape}?",
        "Which color does the {shape} have?",
    ),
    "shape": (
        "What shape is the {color} object?",
        "What is the shape of the {color} object?",
        "Which shape does the {color} object have?",
    ),
    "direction": (
        "In which direction does the {name} move?",
        "Which way does the {name} move?",
        "In which direction does the {color} object move?",
    ),
    "number": (
        "How many objects are there in the video?",
        "How many objects does the video show?",
        "How many objects can you see?",
    ),
    "existence": (
        "Is there a {name} in the video?",
        "Does the video show a {name}?",
        "Can you see a {name}?",
    ),
    "first": (
        "Which object appears first?",
        "Which object appears first in the video?",
        "What is the first object to appear?",
    ),
    "last": (
        "Which object appears last?",
        "Which object appears last in the video?",
        "What is the last object to appear?",
    ),
    "end_color": (
        "What color is the {shape} at the end?",
        "What color is the {shape} at the end of the video?",
        "Which color does the {shape} have at the end?",
    ),
    "stationary": (
        "Which object is stationary?",
        "Which object does not move?",
        "Which object stays still?",
    ),
    "action_count": (
        "How many times does the {name} blink?",
        "How many times does the {color} object blink?",
        "How often does the {name} blink?",
    ),
    "transition": (
        "How does the background change?",
        "What happens to the background?",
        "How does the background change in the video?",
    ),
    "position": (
        "Where is the {name} at the end?",
        "Where is the {color} object at the end?",
        "Where is the {name} at the end of the video?",
    ),
    "brief_event": (
        "Which object flashes?",
        "Which object flashes in the video?",
        "Which object can be seen for a moment only?",
    ),
    DESCRIBE: ("Describe the video.", "What happens in the video?"),
}


@dataclass(frozen=True, slots=True)
class Question:
    family: str
    text: str
    answer: str

    def is_answered_by(self, text: str) -> bool:
        """Whether a short answer is right: the same words, ignoring case and spaces."""
        return text.lower().split() == self.answer.lower().split()


def questions_about(scene: Scene, *, draw: int = 0) -> list[Question]:
    """Every question that the scene allows, each in one phrasing; *Describe* comes last.

    Args:
        draw: other draws give other phrasings, and other absent objects to ask for.
    """
    rng = np.random.default_rng([_QUESTION_KEY, scene.seed, scene.num_frames, draw])
    ask = _Asker(rng)
    questions = [q for ask_about in _ASKERS for q in ask_about(scene, ask)]
    phrasing = 0 if rng.random() < 0.8 else 1
    description = Question(DESCRIBE, PHRASINGS[DESCRIBE][phrasing], describe(scene))
    return [*questions, description]


def guess_about(scene: Scene, rng: np.random.Generator) -> Question:
    """A question about a shape or a colour that the video never shows, with a random answer.

    Every colour and every shape is equally likely, so these questions teach that a question's own
    words say nothing about its answer.
    """
    ask = _Asker(rng)
    color, shape = str(rng.choice(COLORS)), str(rng.choice(SHAPES))
    if rng.random() < 1 / 3:
        shown = {c for thing in scene.things for c in (thing.color, thing.new_color)}
        asked = str(rng.choice([c for c in COLORS if c not in shown]))
        question = ask("shape", f"It is a {shape}.", color=asked)
    else:
        shown = {thing.shape for thing in scene.things}
        asked = str(rng.choice([s for s in SHAPES if s not in shown]))
        family = "color" if rng.random() < 0.5 else "end_color"
        question = ask(family, f"It is {color}.", shape=asked)
    return replace(question, family=GUESS)


class _Asker:
    """Puts a question into one of its family's phrasings."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def __call__(self, family: str, answer: str, *, color: str = "", shape: str = "") -> Question:
        phrasings = PHRASINGS[family]
        text = phrasings[self.rng.integers(len(phrasings))]
        return Question(
            family, text.format(color=color, shape=shape, name=f"{color} {shape}"), answer
        )


def _lasting(scene: Scene) -> list[Thing]:
    """Everything that is there for more than a flash."""
    return [thing for thing in scene.things if not thing.flashes]


def _is_only_one_of_its_shape(thing: Thing, scene: Scene) -> bool:
    return sum(other.shape == thing.shape for other in scene.things) == 1


def _about_colors(scene: Scene, ask: _Asker) -> Iterator[Question]:
    for thing in _lasting(scene):
        keeps_color = thing.new_color is None and not thing.blinks
        if keeps_color and _is_only_one_of_its_shape(thing, scene):
            yield ask("color", f"It is {thing.color}.", shape=thing.shape)


def _about_shapes(scene: Scene, ask: _Asker) -> Iterator[Question]:
    for thing in _lasting(scene):
        if thing.new_color is None:
            yield ask("shape", f"It is a {thing.shape}.", color=thing.color)


def _about_directions(scene: Scene, ask: _Asker) -> Iterator[Question]:
    for thing in _lasting(scene):
        if thing.motion != "still" and thing.new_color is None:
            answer = f"It moves {thing.motion}."
            yield ask("direction", answer, color=thing.color, shape=thing.shape)


def _about_number(scene: Scene, ask: _Asker) -> Iterator[Question]:
    if scene.event != "flash":
        yield ask("number", count_sentence(len(scene.things)))


def _about_existence(scene: Scene, ask: _Asker) -> Iterator[Question]:
    """One thing that is there, and one that is not but resembles one that is."""
    if scene.event in ("change", "flash"):
        return
    things = scene.things
    thing = things[ask.rng.integers(len(things))]
    yield ask("existence", "Yes.", color=thing.color, shape=thing.shape)
    there = {(thing.color, thing.shape) for thing in things}
    while True:
        color, shape = thing.color, thing.shape
        if ask.rng.random() < 0.5:
            color = str(ask.rng.choice(COLORS))
        else:
            shape = str(ask.rng.choice(SHAPES))
        is_never_shown = scene.split == "train" and (color, shape) in HELD_OUT
        if (color, shape) not in there and not is_never_shown:
            yield ask("existence", "No.", color=color, shape=shape)
            return


def _about_order(scene: Scene, ask: _Asker) -> Iterator[Question]:
    if scene.event == "order":
        by_appearance = sorted(scene.things, key=lambda thing: thing.visible.start)
        yield ask("first", f"The {by_appearance[0].name}.")
        yield ask("last", f"The {by_appearance[-1].name}.")


def _about_end_colors(scene: Scene, ask: _Asker) -> Iterator[Question]:
    for thing in _lasting(scene):
        if scene.event == "change" and _is_only_one_of_its_shape(thing, scene):
            answer = f"It is {thing.new_color or thing.color}."
            yield ask("end_color", answer, shape=thing.shape)


def _about_stillness(scene: Scene, ask: _Asker) -> Iterator[Question]:
    """Needs a second thing, and none that flashes: is a flash stationary?"""
    still = [thing for thing in scene.things if thing.motion == "still"]
    if len(still) != 1 or len(scene.things) == 1 or scene.event == "flash":
        return
    if still[0].new_color is None:
        yield ask("stationary", f"The {still[0].name}.")


def _about_blinks(scene: Scene, ask: _Asker) -> Iterator[Question]:
    for thing in scene.things:
        if thing.blinks:
            answer = f"It blinks {TIMES[len(thing.blinks)]}."
            yield ask("action_count", answer, color=thing.color, shape=thing.shape)


def _about_background(scene: Scene, ask: _Asker) -> Iterator[Question]:
    if scene.new_background is not None:
        answer = f"It changes from {scene.background} to {scene.new_background}."
        yield ask("transition", answer)
    else:
        yield ask("transition", f"It stays {scene.background}.")


def _about_positions(scene: Scene, ask: _Asker) -> Iterator[Question]:
    for thing in _lasting(scene):
        if thing.new_color is None and (place := place_at_end(thing)) is not None:
            answer = f"It is at the {place}."
            yield ask("position", answer, color=thing.color, shape=thing.shape)


def _about_flashes(scene: Scene, ask: _Asker) -> Iterator[Question]:
    for thing in scene.things:
        if thing.flashes:
            yield ask("brief_event", f"The {thing.name}.")


def place_at_end(thing: Thing) -> str | None:
    """The quarter of the picture in which a thing ends; None if too near the middle to say."""
    x, y = thing.path[-1] - SIZE / 2
    if min(abs(x), abs(y)) < _MARGIN:
        return None
    return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"


_ASKERS: tuple[Callable[[Scene, _Asker], Iterator[Question]], ...] = (
    _about_colors,
    _about_shapes,
    _about_directions,
    _about_number,
    _about_existence,
    _about_order,
    _about_end_colors,
    _about_stillness,
    _about_blinks,
    _about_background,
    _about_positions,
    _about_flashes,
)
