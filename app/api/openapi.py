"""The parts of the OpenAPI document that FastAPI cannot derive: bodies that we parse ourselves
while they arrive, event streams, and problems.
"""

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from app.api.errors import PROBLEM_MEDIA_TYPE, Problem
from app.api.openai.fields import CompletionFields
from app.api.openai.rendering import NOT_IN_RECEIPT
from app.api.post.expiry import ANCHOR, MAX_SECONDS
from app.api.schemas import ChatFields
from app.messages import DoneEvent, ErrorEvent, JobEvent, StatusEvent, TokenEvent

_REF = "#/components/schemas/{model}"


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    """An object that has all of these."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _with_optional(schema: dict[str, Any], **properties: dict[str, Any]) -> dict[str, Any]:
    """An object that may have these too."""
    return {**schema, "properties": {**schema["properties"], **properties}}


def _json_text(schema: dict[str, Any]) -> dict[str, Any]:
    """A string that holds JSON."""
    return {"type": "string", "contentMediaType": "application/json", "contentSchema": schema}


_EVENTS = (JobEvent, StatusEvent, TokenEvent, DoneEvent, ErrorEvent)
_VIDEO = {
    "type": "string",
    "format": "binary",
    "description": "The video: MP4, MOV, Matroska, WebM, AVI or MPEG-TS.",
}

_SECONDS = {"type": "integer", "minimum": 1, "maximum": MAX_SECONDS}
EXPIRES_AFTER = {
    "description": "Seconds from now on, or OpenAI's {anchor: created_at, seconds}; then the video "
    "goes, with all that is kept of it. Left out: it stays while there is room.",
    "anyOf": [
        _SECONDS,
        {
            "type": "object",
            "properties": {"anchor": {"const": ANCHOR}, "seconds": _SECONDS},
            "required": ["seconds"],
            "additionalProperties": False,
        },
    ],
}

UPLOAD_REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"video": _VIDEO, "expires_after": EXPIRES_AFTER},
                "required": ["video"],
                "additionalProperties": False,
            }
        }
    },
}

CHAT_REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": {"$ref": _REF.format(model="ChatForm")}},
        "application/json": {"schema": {"$ref": _REF.format(model=ChatFields.__name__)}},
    },
}

COMPLETION_REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {"schema": {"$ref": _REF.format(model=CompletionFields.__name__)}}
    },
}

PROBLEMS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "What went wrong, with a stable code.",
        "content": {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": _REF.format(model=Problem.__name__)}}},
    }
}

_NULL = {"type": "null"}
_STRING: dict[str, Any] = {"type": "string"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_FINISH_REASONS = ["stop", "length"]
_HEAD: dict[str, dict[str, Any]] = {"id": _STRING, "created": _COUNT, "model": _STRING}
_COUNTS = {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT}
_COMPLETION = _object(
    **_HEAD,
    object={"const": "chat.completion"},
    choices={
        "type": "array",
        "minItems": 1,
        "maxItems": 1,
        "items": _object(
            index={"const": 0},
            message=_object(role={"const": "assistant"}, content=_STRING, refusal=_NULL),
            logprobs=_NULL,
            finish_reason={"enum": _FINISH_REASONS},
        ),
    },
    usage=_object(
        **_COUNTS,
        prompt_tokens_details=_object(
            cached_tokens=_COUNT, multimodal_tokens=_object(video=_COUNT)
        ),
    ),
    dycoke={"$ref": _REF.format(model="Receipt")},
)
_CHUNK = _with_optional(
    _object(
        **_HEAD,
        object={"const": "chat.completion.chunk"},
        choices={
            "type": "array",
            "maxItems": 1,
            "items": _object(
                index={"const": 0},
                delta=_with_optional(_object(content=_STRING), role={"const": "assistant"}),
                logprobs=_NULL,
                finish_reason={"enum": [*_FINISH_REASONS, None]},
            ),
        },
    ),
    usage={"anyOf": [_NULL, _object(**_COUNTS)]},
    dycoke={"$ref": _REF.format(model="Receipt")},
)
_OPENAI_ERROR = _object(
    error=_with_optional(
        _object(
            message=_STRING,
            type=_STRING,
            param={"type": ["string", "null"]},
            code=_STRING,
        ),
        video_id={**_STRING, "description": "Stored meanwhile: a retry need not send the video."},
    )
)

COMPLETION_RESPONSE: dict[str, Any] = {
    "description": "A chat completion, or with `stream` its chunks. The receipt is in `dycoke`.",
    "content": {
        "application/json": {"schema": _COMPLETION},
        "text/event-stream": {
            "itemSchema": _object(
                data={
                    "anyOf": [{"const": "[DONE]"}, _json_text({"anyOf": [_CHUNK, _OPENAI_ERROR]})]
                }
            )
        },
    },
}

# On the paths of `app.api.openai.errors`.
OPENAI_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "What went wrong, in OpenAI's form, with a stable code.",
        "content": {"application/json": {"schema": _OPENAI_ERROR}},
    }
}

# Each event is described as OpenAPI has it from 3.2 on, and FastAPI already.
_EVENT_STREAM = {
    "text/event-stream": {
        "itemSchema": _with_optional(
            _object(
                event={"enum": [event.model_fields["type"].default for event in _EVENTS]},
                data=_json_text(
                    {"anyOf": [{"$ref": _REF.format(model=event.__name__)} for event in _EVENTS]}
                ),
            ),
            id={**_STRING, "description": "Of events that a reader may resume after."},
        )
    }
}

EVENT_STREAM_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The job's events.", "content": _EVENT_STREAM},
    204: {"description": "There is nothing after Last-Event-ID; the job has ended."},
    **PROBLEMS,
}

CHAT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer as events, or with `stream: false` its receipt.",
        "content": {
            **_EVENT_STREAM,
            "application/json": {"schema": {"$ref": _REF.format(model=DoneEvent.__name__)}},
        },
    },
    **PROBLEMS,
}

VIDEO_CONTENT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The whole video.", "content": {"video/*": {}}},
    206: {
        "description": "The parts that `Range` asks for.",
        "content": {"video/*": {}, "multipart/byteranges": {}},
    },
}
RANGE_PARAMETER: dict[str, Any] = {
    "parameters": [
        {
            "name": "Range",
            "in": "header",
            "required": False,
            "description": "Parts of the video, such as `bytes=0-1023`.",
            "schema": _STRING,
        }
    ]
}


def install_openapi(app: FastAPI) -> None:
    """Adds the schemas that the parts above refer to."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for name, schema in _schemas().items():
            schemas.setdefault(name, schema)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _schemas() -> dict[str, Any]:
    models = (ChatFields, CompletionFields, Problem, *_EVENTS)
    _, document = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    schemas: dict[str, Any] = document["$defs"]
    fields = schemas[ChatFields.__name__]
    schemas["ChatForm"] = {
        **fields,
        "title": "ChatForm",
        "properties": {"video": _VIDEO, **fields["properties"]},
    }
    done = schemas[DoneEvent.__name__]
    schemas["Receipt"] = {
        **done,
        "title": "Receipt",
        "properties": {k: v for k, v in done["properties"].items() if k not in NOT_IN_RECEIPT},
        "required": [name for name in done["required"] if name not in NOT_IN_RECEIPT],
    }
    return schemas
