"""What a request may say of policy `auto`."""

from typing import Any

import pytest

from dycoke_core.auto import DEFAULT_LADDER, AutoConfig, is_auto, resolved_compression
from dycoke_core.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("value", "is_one"),
    [
        ("auto", True),
        ({"policy": "auto"}, True),
        ("dycoke", False),
        ({"k": 0.5}, False),
        (None, False),
    ],
)
def test_the_policy_is_recognised(value: object, is_one: bool) -> None:
    assert is_auto(value) is is_one


def test_what_a_request_leaves_out_is_the_default_s() -> None:
    default = AutoConfig(objective_s=3.0, at_least=0.2, ladder=DEFAULT_LADDER[:2])
    assert AutoConfig.parse({"policy": "auto"}, default) == default
    asked = AutoConfig.parse({"policy": "auto", "objective_s": 1, "at_least": 0.5}, default)
    assert (asked.objective_s, asked.at_least, asked.ladder) == (1.0, 0.5, default.ladder)


def test_the_wire_keeps_everything() -> None:
    config = AutoConfig(objective_s=0.5, at_least=0.3, ladder=DEFAULT_LADDER[1:])
    assert resolved_compression(config.as_dict()) == config
    assert resolved_compression(DEFAULT_LADDER[1].as_dict()) == DEFAULT_LADDER[1]


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ({"objective_s": 0}, "objective_s"),
        ({"objective_s": float("nan")}, "objective_s"),
        ({"objective_s": True}, "objective_s"),
        ({"objective_s": 10**400}, "objective_s"),  # beyond all floats
        ({"at_least": -(10**400)}, "at_least"),
        ({"at_least": 1.1}, "at_least"),
        ({"at_least": "much"}, "at_least"),
        ({"k": 0.5}, "'k'"),
        ({"ladder": []}, "'ladder'"),
    ],
)
def test_values_that_mean_nothing_are_refused(value: dict[str, Any], names: str) -> None:
    with pytest.raises(InvalidRequestError, match=names):
        AutoConfig.parse({"policy": "auto", **value}, AutoConfig())
