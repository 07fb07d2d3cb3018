"""The document's schema of `compression` takes what a request may say, and nothing else."""

from typing import Any

import jsonschema
import pytest

from app.api.compression_schema import compression_schema
from dycoke_core.auto import AutoConfig, parse_compression
from dycoke_core.config import PARAMETER_RANGES, POLICY_PARAMETERS, CompressionConfig
from dycoke_core.errors import InvalidRequestError

SCHEMA = jsonschema.Draft202012Validator(compression_schema())
WHOLE_NUMBERS = ("l", "window", "seed")


def is_taken(value: Any) -> bool:
    """Whether a request may say it."""
    try:
        parse_compression(value, AutoConfig())
    except InvalidRequestError:
        return False
    return True


def values() -> list[Any]:
    found: list[Any] = ["auto", "none", "", *POLICY_PARAMETERS, {}, {"k": 0.5}, {"policy": "none"}]
    for policy in POLICY_PARAMETERS:
        found += [{"policy": policy}, {"policy": policy, "other": 1}]
        for name, (least, greatest) in PARAMETER_RANGES.items():
            numbers = [least, greatest, least - 1, greatest + 1, "1", None]
            if name not in WHOLE_NUMBERS:
                numbers.append((least + greatest) / 2)
            found += [{"policy": policy, name: number} for number in numbers]
        found += [{"policy": policy, "variant": variant} for variant in ("paper", "released", "x")]
    for said in (
        {"objective_s": 1},
        {"objective_s": 0},
        {"objective_s": 1e9},
        {"at_least": 1},
        {"at_least": -0.1},
        {"at_least": 1.1},
        {"k": 0.5},
    ):
        found.append({"policy": "auto", **said})
    return found


@pytest.mark.parametrize("value", values(), ids=str)
def test_the_schema_takes_what_is_taken(value: Any) -> None:
    assert SCHEMA.is_valid(value) is is_taken(value)


def test_null_means_the_servers_default() -> None:
    assert SCHEMA.is_valid(None) and not SCHEMA.is_valid([]) and not SCHEMA.is_valid(1)


def test_defaults_are_those_of_a_request_that_names_nothing() -> None:
    for policy in POLICY_PARAMETERS:
        (schema,) = (
            option
            for option in compression_schema()["anyOf"]
            if option.get("title") == policy and option["type"] == "object"
        )
        defaults = {
            name: parameter["default"]
            for name, parameter in schema["properties"].items()
            if name != "policy"
        }
        assert {"policy": policy, **defaults} == CompressionConfig.parse(policy).as_dict()
