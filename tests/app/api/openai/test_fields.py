"""Which of OpenAI's fields are honoured, without effect, or refused by name."""

from typing import Any

import pytest

from app.api.errors import InvalidFieldsError
from app.api.openai.fields import REFUSED, WITHOUT_EFFECT, parse_fields

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"type": "function", "function": {"name": "f"}}

# Harmless values that clients send, besides null.
HARMLESS: list[dict[str, Any]] = [
    {"n": 1},
    {"logprobs": False},
    {"top_logprobs": 0},
    {"logit_bias": {}},
    {"presence_penalty": 0},
    {"frequency_penalty": 0.0},
    {"response_format": {"type": "text"}},
    {"tools": []},
    {"tools": [TOOL], "tool_choice": "none"},
    {"tool_choice": "auto"},
    {"functions": []},
    {"function_call": "none"},
    {"modalities": ["text"]},
]
HARMFUL: dict[str, Any] = {
    "n": 2,
    "logprobs": True,
    "top_logprobs": 3,
    "logit_bias": {"1": 5},
    "presence_penalty": 0.5,
    "frequency_penalty": -1,
    "response_format": {"type": "json_schema"},
    "tools": [TOOL],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "modalities": ["text", "audio"],
    "audio": {"voice": "x"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_cannot_do_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidFieldsError) as refused:
        parse_fields({**BODY, name: HARMFUL.get(name, "anything")})
    (problem,) = refused.value.problems
    assert problem.field == name and problem.message


@pytest.mark.parametrize("fields", HARMLESS, ids=str)
def test_what_asks_for_nothing_is_taken_without_a_word(fields: dict[str, Any]) -> None:
    _, warnings = parse_fields({**BODY, **fields})
    assert warnings == []


@pytest.mark.parametrize("name", [*WITHOUT_EFFECT, *REFUSED])
def test_null_is_the_same_as_left_out(name: str) -> None:
    assert parse_fields({**BODY, name: None}) == parse_fields(BODY)


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_changes_no_answer_is_taken_without_a_word(name: str) -> None:
    assert parse_fields({**BODY, name: "anything"})[1] == []


def test_what_nobody_knows_is_warned_of_by_name() -> None:
    _, warnings = parse_fields({**BODY, "top_k": 3, "x" * 100: 1})
    assert warnings == [
        "top_k: unknown, without effect",
        f"{'x' * 64}: unknown, without effect",
    ]
