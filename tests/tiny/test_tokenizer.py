"""The bundled tokenizer: any text comes back, its own world's words are whole."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dycoke_core.tiny import CHECKPOINT
from dycoke_core.tiny.scenes import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES
from dycoke_core.tiny.tokenizer import SPECIAL_TOKENS, build_tokenizer

TOKENIZER = build_tokenizer()


@given(st.text().filter(lambda text: not any(token in text for token in SPECIAL_TOKENS)))
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_worlds_words_are_one_token_each() -> None:
    for word in (*COLORS, *SHAPES, *BACKGROUNDS, *DIRECTIONS):
        assert len(TOKENIZER(f" {word}")["input_ids"]) == 1


def test_the_bundled_file_is_this_tokenizer() -> None:
    bundled = AutoTokenizer.from_pretrained(CHECKPOINT)
    assert bundled.get_vocab() == TOKENIZER.get_vocab()
    for color, shape in product(COLORS, SHAPES):
        text = f"A {color} {shape} moves left."
        assert bundled(text)["input_ids"] == TOKENIZER(text)["input_ids"]
