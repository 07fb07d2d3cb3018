"""Policy `auto`: as little compression as the objective, the queue and the load allow.

This module has what a request may set, and what the choice reports. `dycoke_core.level_choice` has
the rule, `dycoke_core.engine.auto_compression` its inputs. Standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from dycoke_core.config import (
    DEFAULT_POLICY,
    POLICY_PARAMETERS,
    CompressionConfig,
    no_such_parameter,
    to_float,
)
from dycoke_core.errors import InvalidRequestError

AUTO = "auto"
AUTO_PARAMETERS = ("objective_s", "at_least")  # that a request may name
DEFAULT_OBJECTIVE_S = 2.0
MAX_OBJECTIVE_S = 3600.0
DEFAULT_LADDER = (
    CompressionConfig("full"),
    CompressionConfig("dycoke", k=0.5),
    CompressionConfig("dycoke", k=0.7),
    CompressionConfig("dycoke", k=0.9),
)
MAX_LEVELS = 8


@dataclass(frozen=True, slots=True)
class AutoConfig:
    """What `auto` may choose from, and what for.

    Args:
        objective_s: time to first token to meet, from the request's acceptance.
        at_least: least share of the visual tokens that the language model must get to see.
        ladder: from the least compression to the strongest.

    Raises:
        InvalidRequestError: a value outside its range.
    """

    objective_s: float = DEFAULT_OBJECTIVE_S
    at_least: float = 0.0
    ladder: tuple[CompressionConfig, ...] = DEFAULT_LADDER

    def __post_init__(self) -> None:
        if not 0 < self.objective_s <= MAX_OBJECTIVE_S:
            raise InvalidRequestError(
                f"compression.objective_s must be above 0 and at most {MAX_OBJECTIVE_S:g}"
            )
        if not 0 <= self.at_least <= 1:
            raise InvalidRequestError("compression.at_least must be between 0 and 1")
        if not 1 <= len(self.ladder) <= MAX_LEVELS:
            raise InvalidRequestError(
                f"a ladder must have 1 to {MAX_LEVELS} levels, and this one has {len(self.ladder)}"
            )

    @classmethod
    def parse(cls, value: Mapping[str, Any], default: "AutoConfig") -> "AutoConfig":
        """Builds a config from `{policy: auto, objective_s, at_least}`; `default` has the rest.

        Raises:
            InvalidRequestError: another parameter, or a value outside its range.
        """
        if unknown := sorted(set(value) - {"policy", *AUTO_PARAMETERS}):
            raise InvalidRequestError(no_such_parameter(AUTO, unknown[0], AUTO_PARAMETERS))
        return cls(
            _number("objective_s", value.get("objective_s", default.objective_s)),
            _number("at_least", value.get("at_least", default.at_least)),
            default.ladder,
        )

    def within(self, limit_s: float) -> "AutoConfig":
        """With an objective of at most this."""
        return replace(self, objective_s=min(self.objective_s, limit_s))

    def as_dict(self) -> dict[str, Any]:
        """For the wire."""
        return {
            "policy": AUTO,
            "objective_s": self.objective_s,
            "at_least": self.at_least,
            "ladder": [level.as_dict() for level in self.ladder],
        }


Compression = CompressionConfig | AutoConfig


def parse_compression(value: str | Mapping[str, Any], auto: AutoConfig) -> Compression:
    """Builds a config from what a request says: a policy's name, or an object.

    Args:
        auto: what a request for `auto` leaves out.

    Raises:
        InvalidRequestError: no such policy, or a parameter outside its range.
    """
    if is_auto(value):
        return auto if isinstance(value, str) else AutoConfig.parse(value, auto)
    policy = value if isinstance(value, str) else value.get("policy", DEFAULT_POLICY)
    if not isinstance(policy, str) or policy not in POLICY_PARAMETERS:
        known = ", ".join(sorted((AUTO, *POLICY_PARAMETERS)))
        raise InvalidRequestError(f"compression.policy must be one of: {known}")
    return CompressionConfig.parse(value)


def resolved_compression(value: Mapping[str, Any]) -> Compression:
    """Builds a config from its own `as_dict`."""
    if not is_auto(value):
        return CompressionConfig.parse(value)
    ladder = tuple(map(CompressionConfig.parse, value["ladder"]))
    return AutoConfig(value["objective_s"], value["at_least"], ladder)


def is_auto(compression: object) -> bool:
    """Whether a request's `compression` names the policy, as a string or in an object."""
    named = compression.get("policy") if isinstance(compression, Mapping) else compression
    return named == AUTO


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError(f"compression.{name} must be a number")
    return to_float(value)


# --- the choice ---


class Reason(StrEnum):
    """Why a level was chosen."""

    OBJECTIVE = "objective"  # the weakest that meets the objective
    QUEUE = "queue"  # the weakest at which those that wait after it would meet it too
    LOAD = "load"  # the weakest that keeps up with the arriving requests
    STEADY = "steady"  # recent requests need a stronger one, or did until just now
    CACHED = "cached"  # its prefix is cached at a weaker level, or at the next stronger one
    NONE_MEETS = "none_meets"  # the strongest that is allowed, or one whose prefix is cached


@dataclass(frozen=True, slots=True)
class Choice:
    level: int  # place in the ladder
    compression: CompressionConfig
    reason: Reason
    predicted_ttft_s: float  # from the request's acceptance


@dataclass(frozen=True, slots=True)
class CachedChoice:
    """What there is to choose for a sequence that would take a cached prefix only.

    Args:
        choice: None: there is no prefix that it should take.
        prefix_keys: of the prefixes that it may take; once one of them is there, ask again.
    """

    choice: Choice | None
    prefix_keys: frozenset[str]
