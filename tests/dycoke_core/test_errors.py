"""The core's errors: what clients read of one, and what some carry besides."""

import pytest

from dycoke_core.errors import (
    DycokeError,
    EngineError,
    InvalidRequestError,
    OutOfMemoryError,
    PromptTooLongError,
    UnreadableFrameError,
    VideoError,
    VideoReaderKilledError,
)


def test_a_message_is_what_is_said_and_a_code_is_the_classs() -> None:
    error = PromptTooLongError("500 tokens are too many")
    assert (error.message, str(error)) == ("500 tokens are too many",) * 2
    assert (error.code, error.retryable) == ("prompt_too_long", False)
    assert isinstance(error, InvalidRequestError)


def test_a_frame_of_a_list_is_named_by_its_number() -> None:
    error = UnreadableFrameError("frame 3 cannot be decoded", 3)
    assert (error.number, error.field) == (3, None)
    error.field = "messages.0.content.1.video.3"
    assert VideoError.field is None, "of this video alone"


@pytest.mark.parametrize("cause", ["memory", "cpu", "crash", "killed"])
def test_a_killed_reader_says_by_what(cause: str) -> None:
    assert VideoReaderKilledError("the reader ended", cause).cause == cause
    assert VideoReaderKilledError("the reader ended").cause == "killed"


def test_a_failure_of_the_engine_may_be_tried_again() -> None:
    assert EngineError("x").retryable and OutOfMemoryError("x").retryable
    assert not DycokeError("x").retryable and DycokeError("x").code == "internal_error"
