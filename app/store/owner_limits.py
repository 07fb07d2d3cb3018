"""How much of the service one key may use, as Redis counts it (see `lua/limits.lua`); and what a
job costs it in the order of the queue (see `lua/order.lua`).

What is refused here is refused to this key alone, however idle the service is. Whether there is
room for anybody is decided by `job_queue`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from app.errors import KeyLimitError
from app.keys.limits import NO_LIMITS, KeyLimits, LimitState, Unit

WINDOW_S = 60
FRAME_COST = 16  # in tokens of an answer: roughly what one frame costs an engine
PLACE_COST = 1024  # cost that one place in the queue covers: 32 frames and 512 tokens
MAX_GUESS_S = 60  # when one of a key's jobs may end


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a request takes: its owner, the limits, and its predicted use."""

    owner: str
    limits: KeyLimits = NO_LIMITS
    prompt_tokens: int = 0
    max_tokens: int = 0
    frames: int = 0

    @property
    def limit_words(self) -> str:
        """For `limits.lua`; empty where there is no limit."""
        numbers = [value or 0 for value in _values(self.limits)]
        return " ".join(map(str, numbers)) if any(numbers) else ""

    @property
    def length(self) -> float:
        """Its cost in the order of the queue: see `order.lua`."""
        return (1 + _cost(self.frames, self.max_tokens)) / (self.limits.weight or 1.0)

    @property
    def taken_words(self) -> str:
        return f"{self.prompt_tokens} {self.max_tokens} {self.frames}"


def num_places(*, frames: int, max_tokens: int) -> int:
    """How many places in the queue a job takes."""
    return max(1, math.ceil(_cost(frames, max_tokens) / PLACE_COST))


def _cost(frames: int, max_tokens: int) -> int:
    """In tokens of an answer."""
    return FRAME_COST * frames + max_tokens


def refuse_over_limits(limit_states: Sequence[LimitState]) -> None:
    """Raises: KeyLimitError."""
    waits_s = [state.wait_s for state in limit_states if state.wait_s is not None]
    if waits_s:
        reached = (state for state in limit_states if state.wait_s is not None)
        limits = ", ".join(f"{state.limit} {_WORDS[state.name]}" for state in reached)
        raise KeyLimitError(
            f"this API key may have {limits}: try again when Retry-After has passed",
            retry_after_s=max(waits_s),
            limit_states=tuple(limit_states),
        )


def parse_limit_states(
    limits: KeyLimits, states: Sequence[Sequence[int]]
) -> tuple[LimitState, ...]:
    """Parses what `limit_states` in `limits.lua` returns, without limits that are not set."""
    rows = zip(_KINDS, _values(limits), states, strict=False)  # it may say nothing
    return tuple(
        _limit_state(name, unit, limit, left, wait_ms)
        for (name, unit), limit, (left, wait_ms) in rows
        if limit
    )


def _limit_state(name: str, unit: Unit, limit: int, left: int, wait_ms: int) -> LimitState:
    wait_s = None if wait_ms < 0 else max(1, math.ceil(wait_ms / 1000))
    if unit == "concurrent-requests":
        guess_s = None if wait_s is None else min(wait_s, MAX_GUESS_S)
        return LimitState(name, unit, limit, left, more_in_s=guess_s, wait_s=guess_s)
    one_in_s = None if left >= limit else math.ceil(WINDOW_S / limit)
    return LimitState(name, unit, limit, left, WINDOW_S, wait_s or one_in_s, wait_s)


_KINDS: tuple[tuple[str, Unit], ...] = (
    ("jobs", "concurrent-requests"),
    ("queued-jobs", "concurrent-requests"),
    ("tokens", "tokens"),
    ("frames", "frames"),
)
_WORDS = {
    "jobs": "jobs at a time",
    "queued-jobs": "waiting jobs at a time",
    "tokens": "tokens a minute",
    "frames": "frames a minute",
}


def _values(limits: KeyLimits) -> tuple[int | None, ...]:
    """In the order of `_KINDS`, which is that of `limits.lua`."""
    return (
        limits.max_jobs,
        limits.max_queued_jobs,
        limits.tokens_per_minute,
        limits.frames_per_minute,
    )
