"""Descriptions of scenes in 20 to 60 tokens, and the facts that they state.

A description is a sentence on the number of things, one on each thing in the order of COLORS, and
one on the background. `facts_of` parses it, in any order of sentences, so that an answer can be
scored by its facts: those it states of the scene, and those it makes up.
"""

import re

from dycoke_core.tiny.scenes import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, Scene, Thing

NUMBERS = ("zero", "one", "two", "three")
TIMES = ("never", "once", "twice", "three times")


def describe(scene: Scene) -> str:
    things = sorted(scene.things, key=lambda thing: COLORS.index(thing.color))
    sentences = [f"{count_sentence(len(things))[:-1]} in the video."]
    sentences += [f"A {thing.name} {_deeds(thing)}." for thing in things]
    if scene.new_background is None:
        sentences.append(f"The background is {scene.background}.")
    else:
        sentences.append(
            f"The background changes from {scene.background} to {scene.new_background}."
        )
    return " ".join(sentences)


def count_sentence(number: int) -> str:
    is_are, plural = ("is", "") if number == 1 else ("are", "s")
    return f"There {is_are} {NUMBERS[number]} object{plural}."


def _deeds(thing: Thing) -> str:
    if thing.flashes:
        return "flashes"
    deeds = "stays still" if thing.motion == "still" else f"moves {thing.motion}"
    if thing.new_color is not None:
        deeds += f" and turns {thing.new_color}"
    if thing.blinks:
        deeds += f" and blinks {TIMES[len(thing.blinks)]}"
    return deeds


_THING = re.compile(rf"an? ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b(.*)")
_DEEDS = re.compile(
    rf"(flashes|stays still|moves (?:{'|'.join(DIRECTIONS)})"
    rf"|turns (?:{'|'.join(COLORS)})|blinks (?:{'|'.join(TIMES[1:])}))"
)
_COUNT = re.compile(rf"there (?:is|are) ({'|'.join(NUMBERS)}) objects?")
_BACKGROUND = re.compile(
    rf"the background (?:is|changes from) ({'|'.join(BACKGROUNDS)})"
    rf"(?: to ({'|'.join(BACKGROUNDS)}))?"
)


def facts_of(text: str) -> frozenset[str]:
    """The facts that a description states.

    The number of things, each thing's colour and shape ("red circle"), each of its actions ("red
    moves left"; colours identify things), and the background before and after.
    """
    facts: set[str] = set()
    for sentence in text.lower().split("."):
        if found := _COUNT.search(sentence):
            facts.add(f"number {found[1]}")
        elif found := _BACKGROUND.search(sentence):
            facts.add(f"background {found[1]}")
            if found[2]:
                facts.add(f"background becomes {found[2]}")
        elif found := _THING.search(sentence):
            facts.add(f"{found[1]} {found[2]}")
            facts.update(f"{found[1]} {deed}" for deed in _DEEDS.findall(found[3]))
    return frozenset(facts)


def share_of_facts(text: str, reference: str) -> float:
    """How much of a reference description an answer gets right, in [0, 1].

    The F1 of their facts: missing and made-up facts both count.
    """
    stated, true = facts_of(text), facts_of(reference)
    return 2 * len(stated & true) / (len(stated) + len(true))
