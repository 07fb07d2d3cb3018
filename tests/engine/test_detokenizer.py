"""Deltas: never half a character, never part of a stop string, and they add up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dycoke_core.engine.detokenizer import Detokenizer
from dycoke_core.model.llava_onevision import LlavaOnevision


def run(model: LlavaOnevision, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    detokenizer = Detokenizer(model.prompt_encoder.tokenizer, stop)
    deltas = [detokenizer.push(token) for token in ids]
    deltas.append(detokenizer.flush())
    assert detokenizer.text == "".join(deltas)
    return deltas


def encode(model: LlavaOnevision, text: str) -> list[int]:
    ids = model.prompt_encoder.tokenizer(text)["input_ids"]
    assert isinstance(ids, list)
    return ids


@pytest.mark.parametrize("text", ["The red circle moves.", "naïve 🎬 動画 ünïcödé", " a  b\n\nc"])
def test_deltas_add_up_to_the_text(text: str, tiny_model: LlavaOnevision) -> None:
    deltas = run(tiny_model, encode(tiny_model, text))
    assert "".join(deltas) == text
    assert all("\ufffd" not in delta for delta in deltas)


def test_half_a_character_waits_for_its_other_half(tiny_model: LlavaOnevision) -> None:
    deltas = run(tiny_model, encode(tiny_model, "🎬"))
    assert deltas == ["", "", "", "🎬", ""]


def test_a_character_that_never_ends_is_flushed_as_replacement(tiny_model: LlavaOnevision) -> None:
    assert "".join(run(tiny_model, encode(tiny_model, "🎬")[:2])) == "\ufffd"


def test_invalid_bytes_do_not_hold_back_the_rest(tiny_model: LlavaOnevision) -> None:
    half = encode(tiny_model, "🎬")[:1]
    deltas = run(tiny_model, half * 20)
    assert any(deltas[:-1])


def test_special_tokens_have_no_text(tiny_model: LlavaOnevision) -> None:
    end = next(iter(tiny_model.eos_token_ids))
    assert run(tiny_model, [*encode(tiny_model, "red"), end])[-2:] == ["", ""]


def test_the_beginning_of_a_stop_string_is_held_back(tiny_model: LlavaOnevision) -> None:
    ids = encode(tiny_model, "red circle.")
    deltas = run(tiny_model, ids, stop=("circle!",))
    assert "".join(deltas) == "red circle."
    position = 0
    for delta in deltas[:-2]:
        position += len(delta)
        assert position <= len("red "), "nothing of 'circle' before it is known to be no stop"


@given(
    text=st.text(alphabet="ab c", min_size=0, max_size=20),
    stop=st.lists(st.text(alphabet="ab c", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string(
    text: str, stop: list[str], tiny_model: LlavaOnevision
) -> None:
    ids = encode(tiny_model, text)
    detokenizer = Detokenizer(tiny_model.prompt_encoder.tokenizer, tuple(stop))
    shown = ""
    for token in ids:
        shown += detokenizer.push(token)
        if detokenizer.is_stopped:
            break
    shown += detokenizer.flush()
    places = [text.find(s) for s in stop if s in text]
    if places and detokenizer.is_stopped:
        assert text.startswith(shown)
        assert not any(s in shown for s in stop)
    else:
        assert not places
        assert shown == text


def test_pushing_the_same_ids_rebuilds_the_same_state(tiny_model: LlavaOnevision) -> None:
    ids = encode(tiny_model, "🎬 red circle. 動画")
    whole = run(tiny_model, ids, stop=("circle!",))
    replayed = Detokenizer(tiny_model.prompt_encoder.tokenizer, ("circle!",))
    for token in ids[:7]:
        replayed.push(token)
    assert [replayed.push(token) for token in ids[7:]] + [replayed.flush()] == whole[7:]
