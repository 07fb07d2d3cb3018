"""The tree of errors: each has a stable code of its own, and a refusal carries what helps."""

import inspect

import pytest

import app.errors
import dycoke_core.errors
from app.errors import (
    FrameStoreFullError,
    KeyLimitError,
    ServiceError,
    TryLaterError,
    error_codes,
)
from app.keys.limits import LimitState
from dycoke_core.errors import DycokeError

CLASSES = [
    value
    for module in (app.errors, dycoke_core.errors)
    for value in vars(module).values()
    if inspect.isclass(value) and issubclass(value, DycokeError)
]


def test_every_code_is_listed_and_belongs_to_one_class() -> None:
    own = [error_class.code for error_class in set(CLASSES) if "code" in vars(error_class)]
    assert len(own) == len(set(own))
    assert set(own) <= set(error_codes())
    assert list(error_codes()) == sorted(set(error_codes()))


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda c: c.__name__)
def test_only_those_that_nobody_raises_have_no_code(error_class: type[DycokeError]) -> None:
    is_group = error_class in (DycokeError, ServiceError, TryLaterError)
    assert (error_class.code == "internal_error") is is_group


def test_a_key_that_has_reached_a_limit_is_told_which() -> None:
    states = (
        LimitState("jobs", "concurrent-requests", limit=2, left=0, wait_s=3),
        LimitState("tokens", "tokens", limit=100, left=50, window_s=60),
    )
    error = KeyLimitError("as many as it may", retry_after_s=3, limit_states=states)
    assert error.violated == states[:1] and error.limit_states == states
    assert error.retryable and error.video_id is None


def test_a_full_frame_store_names_the_video_that_need_not_come_again() -> None:
    error = FrameStoreFullError(video_id="vid_1")
    assert (error.video_id, error.retryable) == ("vid_1", True) and error.retry_after_s > 0
