"""How much a key may use, and how much of that is left. Knows neither Redis nor HTTP."""

from dataclasses import dataclass
from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from dycoke_core.config import PRIORITIES, Priority

MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0
MAX_LIMIT = 10**12  # Lua counts exactly far beyond this

Unit = Literal["concurrent-requests", "tokens", "frames"]


class KeyLimits(BaseModel):
    """What one key may take of the service. None: what the settings say for every key; 0: no limit.

    Args:
        max_jobs: under way at a time, from their acceptance to their end.
        max_queued_jobs: of those, such as no worker has.
        tokens_per_minute: of prompts and answers, as receipts count them.
        max_stored_bytes, max_stored_videos: of its uploads; beyond them its own oldest go.
        weight: of its share of the workers where others wait too; None: 1.
        max_priority: the highest that its jobs may have.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_jobs: int | None = Field(
        None, ge=0, le=MAX_LIMIT, validation_alias=AliasChoices("max_jobs", "max_running_jobs")
    )
    max_queued_jobs: int | None = Field(None, ge=0, le=MAX_LIMIT)
    tokens_per_minute: int | None = Field(None, ge=0, le=MAX_LIMIT)
    frames_per_minute: int | None = Field(None, ge=0, le=MAX_LIMIT)
    max_stored_bytes: int | None = Field(None, ge=0, le=MAX_LIMIT)
    max_stored_videos: int | None = Field(None, ge=0, le=MAX_LIMIT)
    weight: float | None = Field(None, ge=MIN_WEIGHT, le=MAX_WEIGHT)
    # Left out of the file where it is not set: the previous release refuses fields it lacks.
    max_priority: Priority | None = Field(None, exclude_if=lambda value: value is None)

    def or_else(self, defaults: "KeyLimits") -> "KeyLimits":
        """These limits, and where they say nothing, the others."""
        return defaults.model_copy(update=self.model_dump(exclude_none=True))

    def capped(self, priority: Priority) -> Priority:
        """The priority, or the highest that there may be."""
        return max(priority, self.max_priority or priority, key=PRIORITIES.index)


NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True)
class LimitState:
    """Args:
    window_s: in which the limit is refilled; None: it bounds what is under way.
    more_in_s: when there will be more; None: not known, or nothing is missing.
    wait_s: when to try again what was refused; None: nothing was.
    """

    name: str
    unit: Unit
    limit: int
    left: int
    window_s: int | None = None
    more_in_s: int | None = None
    wait_s: int | None = None
