"""What a request's `compression` means here: a policy with its parameters, or `auto`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

from app.settings import Settings
from dycoke_core.auto import AutoConfig, Compression, parse_compression
from dycoke_core.compression.counts import count_visual_tokens
from dycoke_core.config import CompressionConfig
from dycoke_core.errors import InvalidRequestError

_USUAL_VIDEO = (32, 196)  # frames, tokens of each
_LADDER_FORM = (
    "write a JSON list of policies' names or objects, from the least compression to the strongest"
)


@dataclass(frozen=True, slots=True)
class Compressions:
    """Args:
    default: for requests that name none.
    auto: defaults of requests for `auto`.
    """

    default: Compression
    auto: AutoConfig

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Raises ValueError: a setting names no policy, or a parameter outside its range."""
        try:
            auto = _auto(settings)
        except InvalidRequestError as error:
            raise ValueError(f"DYCOKE_AUTO_LADDER: {error}") from error
        try:
            default = parse_compression(_from_text(settings.default_compression), auto)
            _check_at_least(default)
        except InvalidRequestError as error:
            raise ValueError(f"DYCOKE_DEFAULT_COMPRESSION: {error}") from error
        return cls(default, auto)

    def parse(self, value: str | Mapping[str, Any] | None) -> Compression:
        """Raises InvalidRequestError: no such policy, or a parameter outside its range."""
        return self.default if value is None else parse_compression(value, self.auto)


def _auto(settings: Settings) -> AutoConfig:
    default = AutoConfig(settings.auto_objective_s)
    if settings.auto_ladder is None:
        return default
    try:
        ladder = json.loads(settings.auto_ladder)
    except ValueError as error:
        raise InvalidRequestError(f"not valid JSON; {_LADDER_FORM}") from error
    if not isinstance(ladder, list) or not all(isinstance(level, str | dict) for level in ladder):
        raise InvalidRequestError(_LADDER_FORM)
    levels = tuple(map(CompressionConfig.parse, ladder))
    _check_order(levels)
    return replace(default, ladder=levels)


def _check_order(levels: Sequence[CompressionConfig]) -> None:
    """Levels that keep the same tokens may differ in stage II."""
    kept = _num_kept(levels)
    for place, (weaker, stronger) in enumerate(pairwise(kept)):
        if stronger > weaker:
            raise InvalidRequestError(
                f"level {place + 1} keeps more visual tokens than level {place}; {_LADDER_FORM}"
            )


def _check_at_least(default: Compression) -> None:
    if not isinstance(default, AutoConfig):
        return
    share = max(_num_kept(default.ladder)) / math.prod(_USUAL_VIDEO)
    if share < default.at_least:
        raise InvalidRequestError(
            f"compression.at_least must be at most {share:.3g}: no level of DYCOKE_AUTO_LADDER "
            "keeps more of the visual tokens"
        )


def _num_kept(levels: Sequence[CompressionConfig]) -> list[int]:
    return [count_visual_tokens(level, *_USUAL_VIDEO) for level in levels]


def _from_text(text: str) -> str | dict[str, Any]:
    if not text.lstrip().startswith("{"):
        return text
    try:
        value: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(
            "compression is neither a policy's name nor a valid JSON object"
        ) from error
    return value
