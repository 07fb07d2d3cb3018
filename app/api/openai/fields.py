"""The fields of a chat completion, in three groups: honoured, without effect, and refused.

A field is refused if dropping it would change the answer's meaning, or if it is dangerous in other
servers. Any other unknown field is accepted, with a warning in the receipt.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.api.errors import FieldProblem, InvalidFieldsError
from app.api.schemas import MAX_TURNS, StopText
from dycoke_core.config import Priority

MAX_WARNINGS = 16

WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "parallel_tool_calls")
IS_NOT_SUPPORTED = "is not supported: leave it out"


class _Lenient(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class StreamOptionFields(_Lenient):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CompletionFields(_Lenient):
    """A body's honoured fields. null is the same as left out."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_TURNS)]
    model: Annotated[str | None, Field(max_length=256)] = None
    stream: bool | None = None
    stream_options: StreamOptionFields | None = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None
    compression: str | dict[str, Any] | None = None
    on_disconnect: Literal["cancel", "continue"] | None = None
    kept_mask: bool | None = None
    priority: Priority | None = None
    deadline_s: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    media_io_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field that is taken with harmless values alone."""

    is_harmless: Callable[[Any, Mapping[str, Any]], bool]
    message: str = IS_NOT_SUPPORTED


def _unless(*values: Any) -> Callable[[Any, Mapping[str, Any]], bool]:
    return lambda value, _: any(value == harmless for harmless in values)


REFUSED: Mapping[str, Refusal] = {
    "n": Refusal(_unless(1), "must be 1: a request has one answer"),
    "logprobs": Refusal(_unless(False)),
    "top_logprobs": Refusal(_unless(0)),
    "logit_bias": Refusal(_unless({})),
    "presence_penalty": Refusal(_unless(0), "must be 0: penalties are not supported"),
    "frequency_penalty": Refusal(_unless(0), "must be 0: penalties are not supported"),
    "response_format": Refusal(
        lambda value, _: isinstance(value, dict) and value.get("type") == "text",
        "must be of type 'text'",
    ),
    "tools": Refusal(
        lambda value, data: value == [] or data.get("tool_choice") == "none",
        "are not supported, unless 'tool_choice' is 'none'",
    ),
    "tool_choice": Refusal(
        lambda value, data: value in ("none", "auto"), "must be 'none': tools are not supported"
    ),
    "functions": Refusal(_unless([])),
    "function_call": Refusal(_unless("none")),
    "modalities": Refusal(_unless(["text"]), "must be ['text']"),
    "audio": Refusal(_unless()),
    # A template, a regular expression, a grammar or code of the client's would run in the server.
    **{
        name: Refusal(_unless({}))
        for name in (
            "chat_template",
            "chat_template_kwargs",
            "prompt_embeds",
            "structured_outputs",
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "guided_whitespace_pattern",
            "logits_processors",
            "custom_logit_processor",
            "regex",
            "ebnf",
            "json_schema",
            "structural_tag",
        )
    },
}


def parse_fields(data: dict[str, Any]) -> tuple[CompletionFields, list[str]]:
    """Checks everything but the messages' content.

    Returns:
        The fields, and warnings.

    Raises:
        InvalidFieldsError: names every field that is wrong.
    """
    data = {name: value for name, value in data.items() if value is not None}
    problems = [
        FieldProblem(field=name, message=refusal.message)
        for name, refusal in REFUSED.items()
        if name in data and not refusal.is_harmless(data[name], data)
    ]
    if problems:
        raise InvalidFieldsError(problems)
    try:
        fields = CompletionFields.model_validate(data, strict=True)
    except ValidationError as error:
        raise InvalidFieldsError.from_pydantic(
            error.errors(include_input=False, include_url=False)
        ) from None
    if fields.stream_options is not None and not fields.stream:
        raise wrong("stream_options", "is only allowed with 'stream'")
    known = {*WITHOUT_EFFECT, *REFUSED}
    warnings = [unknown(name) for name in fields.model_extra or {} if name not in known]
    if fields.stream_options is not None:
        extra = fields.stream_options.model_extra or {}
        warnings += [unknown(f"stream_options.{name}") for name in extra]
    return fields, warnings


def unknown(name: str) -> str:
    return f"{name[:64]}: unknown, without effect"


wrong = InvalidFieldsError.of
