"""Descriptions of scenes, and the facts that are read off an answer."""

import pytest

from dycoke_core.tiny.descriptions import describe, facts_of, share_of_facts
from dycoke_core.tiny.questions import (
    DESCRIBE,
    Question,
)
from dycoke_core.tiny.scenes import sample_scene
from dycoke_core.tiny.testset import score
from dycoke_core.tiny.tokenizer import build_tokenizer


def test_descriptions_have_20_to_60_tokens() -> None:
    tokenizer = build_tokenizer()
    for seed in range(300):
        scene = sample_scene(seed, split=("train", "test")[seed % 2], num_frames=8)
        assert 20 <= len(tokenizer(describe(scene) + "<|im_end|>")["input_ids"]) <= 60


def test_facts_are_found_in_any_order_and_counted_once() -> None:
    text = "There are two objects in the video. A red circle moves left and blinks twice. A blue "
    text += "square flashes. The background changes from black to gray."
    facts = facts_of(text)
    assert facts == {
        "number two", "red circle", "red moves left", "red blinks twice", "blue square",
        "blue flashes", "background black", "background becomes gray",
    }  # fmt: skip
    assert facts_of(". ".join(reversed(text.split(". ")))) == facts


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("A red circle moves left. The background is black.", 1.0),
        ("A red circle moves right. The background is black.", 2 / 3),
        ("The background is black.", 0.5),
        ("A red circle moves left. A blue cross flashes. The background is black.", 0.75),
        ("", 0.0),
    ],
)
def test_what_is_missing_and_what_is_made_up_both_count(answer: str, share: float) -> None:
    reference = "A red circle moves left. The background is black."
    assert share_of_facts(answer, reference) == pytest.approx(share)
    assert score(Question(DESCRIBE, "", reference), answer) == pytest.approx(share)
