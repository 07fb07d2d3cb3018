"""The JSON schema of a request's `compression`: a policy's name, or one object per policy.

It is made from the tables that requests are checked against, so the two cannot disagree.
"""

from dataclasses import fields
from typing import Any, get_args

from dycoke_core.auto import AUTO, MAX_OBJECTIVE_S
from dycoke_core.config import (
    DEFAULT_POLICY,
    PARAMETER_RANGES,
    POLICY_PARAMETERS,
    CompressionConfig,
    TtmVariant,
)


def compression_schema() -> dict[str, Any]:
    """What a request may say; null means the server's default."""
    names = {"type": "string", "enum": [*POLICY_PARAMETERS, AUTO], "title": "Policy"}
    objects = [_object(policy, taken) for policy, taken in POLICY_PARAMETERS.items()]
    return {"anyOf": [names, *objects, _auto(), {"type": "null"}]}


def _object(policy: str, taken: tuple[str, ...]) -> dict[str, Any]:
    return {
        "type": "object",
        "title": policy,
        "properties": {
            "policy": {"type": "string", "const": policy},
            **{name: _parameter(name) for name in taken},
        },
        "required": [] if policy == DEFAULT_POLICY else ["policy"],
        "additionalProperties": False,
    }


def _auto() -> dict[str, Any]:
    objective = {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_OBJECTIVE_S}
    return {
        "type": "object",
        "title": AUTO,
        "properties": {
            "policy": {"type": "string", "const": AUTO},
            "objective_s": objective,
            "at_least": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.0},
        },
        "required": ["policy"],
        "additionalProperties": False,
    }


def _parameter(name: str) -> dict[str, Any]:
    default = {field.name: field.default for field in fields(CompressionConfig)}[name]
    if name not in PARAMETER_RANGES:
        return {"type": "string", "enum": list(get_args(TtmVariant)), "default": default}
    least, greatest = PARAMETER_RANGES[name]
    kind = "integer" if isinstance(default, int) else "number"
    return {"type": kind, "minimum": least, "maximum": greatest, "default": default}
