"""What FastAPI cannot derive for the OpenAPI document: bodies that we parse ourselves as they come
in, event streams, and problems.
"""

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from app.api.errors import PROBLEM_MEDIA_TYPE, Problem
from app.api.openai.rendering import NOT_IN_RECEIPT
from app.api.schemas import ChatFields
from app.messages import DoneEvent, ErrorEvent, JobEvent, StatusEvent, TokenEvent

_REF = "#/components/schemas/{model}"


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    """An object that has all of these."""
    return {"type": "object", "properties": properties, "required": list(properties)}


_EVENTS = (JobEvent, StatusEvent, TokenEvent, DoneEvent, ErrorEvent)
_VIDEO = {
    "type": "string",
    "format": "binary",
    "description": "The video: MP4, MOV, Matroska, WebM, AVI or MPEG-TS.",
}

EXPIRES_AFTER = {
    "description": "Seconds from now on, or OpenAI's {anchor: created_at, seconds}; then the video "
    "goes, with all that is kept of it. Left out: it stays while there is room.",
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {
            "type": "object",
            "properties": {
                "anchor": {"const": "created_at"},
                "seconds": {"type": "integer", "minimum": 1},
            },
            "required": ["seconds"],
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

PROBLEMS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "What went wrong, with a stable code.",
        "content": {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": _REF.format(model=Problem.__name__)}}},
    }
}

_NULL = {"type": "null"}
_COUNT = {"type": "integer", "minimum": 0}
_COMPLETION = _object(
    id={"type": "string"},
    object={"const": "chat.completion"},
    created=_COUNT,
    model={"type": "string"},
    choices={
        "type": "array",
        "minItems": 1,
        "maxItems": 1,
        "items": _object(
            index={"const": 0},
            message=_object(role={"const": "assistant"}, content={"type": "string"}, refusal=_NULL),
            logprobs=_NULL,
            finish_reason={"enum": ["stop", "length"]},
        ),
    },
    usage=_object(
        prompt_tokens=_COUNT,
        completion_tokens=_COUNT,
        total_tokens=_COUNT,
        prompt_tokens_details=_object(
            cached_tokens=_COUNT, multimodal_tokens=_object(video=_COUNT)
        ),
    ),
    dycoke={"$ref": _REF.format(model="Receipt")},
)

COMPLETION_RESPONSE: dict[str, Any] = {
    "description": "A chat completion, or with `stream` its chunks. The receipt is in `dycoke`.",
    "content": {
        "application/json": {"schema": _COMPLETION},
        "text/event-stream": {
            "schema": {
                "type": "string",
                "description": "Chunks as bare `data:` lines, then `data: [DONE]`.",
            }
        },
    },
}

# On the paths of `app.api.openai.errors`.
OPENAI_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "What went wrong, in OpenAI's form, with a stable code.",
        "content": {
            "application/json": {
                "schema": _object(
                    error={
                        **_object(
                            message={"type": "string"},
                            type={"type": "string"},
                            param={"type": ["string", "null"]},
                            code={"type": "string"},
                        ),
                        "description": "With `video_id` where a retry need not send the video.",
                    }
                )
            }
        },
    }
}

_EVENT_STREAM = {
    "text/event-stream": {
        "schema": {
            "type": "string",
            "description": "Server-sent events; the data of each is one of "
            + ", ".join(f"`{event.__name__}`" for event in _EVENTS),
        }
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
    models = (ChatFields, Problem, *_EVENTS)
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
