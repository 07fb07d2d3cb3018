"""Policy `auto`: the least compression whose predicted time to first token meets an objective.

A ladder orders compressions from the least to the strongest. When a sequence is about to enter the
engine, each level's time to first token is predicted from what the engine still has to do, what
the level adds to it, and rates that are measured as the engine runs. Standard library only.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dycoke_core.config import CompressionConfig
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
EASING = 0.8  # share of the objective that a prediction must meet before compression is eased
_MEMORY = 0.9  # of earlier observations, at each new one


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
            raise InvalidRequestError(f"a ladder has 1 to {MAX_LEVELS} levels")

    @classmethod
    def parse(cls, value: Mapping[str, Any], default: "AutoConfig") -> "AutoConfig":
        """Builds a config from `{policy: auto, objective_s, at_least}`; `default` has the rest.

        Raises:
            InvalidRequestError: another parameter, or a value outside its range.
        """
        if unknown := sorted(set(value) - {"policy", *AUTO_PARAMETERS}):
            raise InvalidRequestError(f"policy 'auto' takes no parameter '{unknown[0]}'")
        return cls(
            _number("objective_s", value.get("objective_s", default.objective_s)),
            _number("at_least", value.get("at_least", default.at_least)),
            default.ladder,
        )

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
    if not is_auto(value):
        return CompressionConfig.parse(value)
    return auto if isinstance(value, str) else AutoConfig.parse(value, auto)


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
    return float(value)


# --- predictions ---


@dataclass(frozen=True, slots=True)
class Work:
    """What has to be done before a first token.

    Args:
        vision_patches: to be encoded.
        prompt_tokens: to be prefilled.
    """

    vision_patches: int
    prompt_tokens: int

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.vision_patches + other.vision_patches, self.prompt_tokens + other.prompt_tokens
        )


@dataclass(frozen=True, slots=True)
class Level:
    """A rung of the ladder, for one sequence at one moment.

    Args:
        retained: share of the visual tokens that the language model sees, V / (F * N).
        is_cached: its prefix is there, or being prefilled.
        predicted_ttft_s: from the request's acceptance.
    """

    compression: CompressionConfig
    retained: float
    is_cached: bool
    predicted_ttft_s: float


@dataclass(slots=True)
class _Rate:
    """Seconds per unit, as a mean that forgets; a seed counts as one observation."""

    seconds: float
    amount: float = 1.0
    is_measured: bool = False

    @property
    def value(self) -> float:
        return self.seconds / self.amount

    def note(self, seconds: float, amount: float) -> None:
        """Large observations weigh more: fixed costs show in small ones."""
        self.seconds = _MEMORY * self.seconds + max(seconds, 0.0)
        self.amount = _MEMORY * self.amount + amount
        self.is_measured = True


class Rates:
    """How fast an engine works, measured as it runs.

    Args:
        patch_s: of vision, per patch.
        token_s: of prefill, per prompt token.
        step_s: of a decode step of all running sequences.
        max_prompt_tokens: of one pass.
    """

    def __init__(
        self, patch_s: float, token_s: float, step_s: float, *, max_prompt_tokens: int
    ) -> None:
        self._patch = _Rate(patch_s)
        self._token = _Rate(token_s)
        self._step = _Rate(step_s)
        self._steps_per_patch = _Rate(0.0)
        self._max_prompt_tokens = max_prompt_tokens

    def note_vision(self, num_patches: int, seconds: float, num_steps: int) -> None:
        """Takes in that patches were encoded in slices of so many steps."""
        self._patch.note(seconds, num_patches)
        self._steps_per_patch.note(num_steps, num_patches)

    def note_pass(self, seconds: float, *, num_prompt_tokens: int, is_decoding: bool) -> None:
        """Takes in a pass. What decode rows add to prompts is what decode steps took alone."""
        if not num_prompt_tokens:
            self._step.note(seconds, 1.0)
            return
        if is_decoding:
            seconds -= self._step.value
        self._token.note(seconds, num_prompt_tokens)

    def are_measured(self, work: Work) -> bool:
        """Whether the like of the work has run; else its rates are still the seeds."""
        has_vision = self._patch.is_measured or not work.vision_patches
        return self._token.is_measured and has_vision

    def seconds(self, work: Work, *, is_decoding: bool) -> float:
        """For how long the work takes, with a decode step beside each of its steps."""
        seconds = work.vision_patches * self._patch.value + work.prompt_tokens * self._token.value
        if is_decoding:
            num_steps = work.vision_patches * self._steps_per_patch.value
            num_steps += math.ceil(work.prompt_tokens / self._max_prompt_tokens)
            seconds += num_steps * self._step.value
        return seconds


# --- the choice ---


class Reason(StrEnum):
    """Why a level was chosen."""

    OBJECTIVE = "objective"  # the least that meets it
    CACHED = "cached"  # one level stronger than that, whose prefix is there
    STEADY = "steady"  # one level stronger than that, because load has only just eased
    NONE_MEETS = "none_meets"  # the fastest that is allowed


@dataclass(frozen=True, slots=True)
class Choice:
    level: int  # place in the ladder
    compression: CompressionConfig
    reason: Reason
    predicted_ttft_s: float


@dataclass(slots=True)
class Chooser:
    """Chooses levels for one engine. It remembers the last choice, so that levels do not flap."""

    _last: int = 0

    def choose(self, config: AutoConfig, levels: Mapping[int, Level]) -> Choice:
        """Args:
        levels: by their place in the ladder; those that the sequence fits in, at least one.
        """
        allowed = {
            place: level for place, level in levels.items() if level.retained >= config.at_least
        } or {min(levels): levels[min(levels)]}
        meeting = [
            place
            for place, level in allowed.items()
            if level.predicted_ttft_s <= config.objective_s
        ]
        if meeting:
            place, reason = self._least(config, levels, sorted(meeting))
        else:
            # Of equally fast ones the least compression.
            place = min(
                allowed, key=lambda place: (round(levels[place].predicted_ttft_s, 3), place)
            )
            reason = Reason.NONE_MEETS
        self._last = place
        chosen = levels[place]
        return Choice(place, chosen.compression, reason, chosen.predicted_ttft_s)

    def _least(
        self, config: AutoConfig, levels: Mapping[int, Level], meeting: Sequence[int]
    ) -> tuple[int, Reason]:
        least, stronger = meeting[0], meeting[min(1, len(meeting) - 1)]
        if levels[least].is_cached:
            return least, Reason.OBJECTIVE
        if levels[stronger].is_cached:
            return stronger, Reason.CACHED
        would_ease = least < self._last
        if would_ease and levels[least].predicted_ttft_s > EASING * config.objective_s:
            return stronger, Reason.STEADY
        return least, Reason.OBJECTIVE
