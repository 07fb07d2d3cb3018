"""What a key may take: defaults, ceilings of priority, and how limits are written down."""

import pytest
from pydantic import ValidationError

from app.keys.limits import MAX_LIMIT, NO_LIMITS, KeyLimits
from dycoke_core.config import PRIORITIES, Priority


def test_what_a_key_does_not_say_is_the_settings() -> None:
    defaults = KeyLimits(max_jobs=10, tokens_per_minute=1000, weight=2.0)
    own = KeyLimits(max_jobs=0, frames_per_minute=5)
    assert own.or_else(defaults) == KeyLimits(
        max_jobs=0, tokens_per_minute=1000, frames_per_minute=5, weight=2.0
    )
    assert NO_LIMITS.or_else(defaults) == defaults
    assert defaults.or_else(NO_LIMITS) == defaults


@pytest.mark.parametrize("highest", [None, *PRIORITIES])
@pytest.mark.parametrize("asked", PRIORITIES)
def test_a_priority_is_never_above_the_highest_that_a_key_may_have(
    asked: Priority, highest: Priority | None
) -> None:
    given = KeyLimits(max_priority=highest).capped(asked)
    most = PRIORITIES.index(highest) if highest else 0
    assert PRIORITIES.index(given) == max(PRIORITIES.index(asked), most)


def test_the_earlier_name_of_a_limit_is_read() -> None:
    assert KeyLimits.model_validate({"max_running_jobs": 3}).max_jobs == 3


def test_the_previous_release_reads_what_is_written_without_a_priority() -> None:
    assert "max_priority" not in KeyLimits(max_jobs=1).model_dump(mode="json")
    written = KeyLimits(max_priority="low").model_dump(mode="json")
    assert KeyLimits.model_validate(written).max_priority == "low"


@pytest.mark.parametrize(
    "said",
    [
        {"max_jobs": -1},
        {"tokens_per_minute": MAX_LIMIT + 1},
        {"weight": 0.0},
        {"weight": 1000.0},
        {"max_priority": "urgent"},
        {"max_job": 1},
    ],
)
def test_what_is_out_of_range_or_unknown_is_refused(said: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        KeyLimits.model_validate(said)
