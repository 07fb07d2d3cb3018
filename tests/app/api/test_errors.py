"""Every error code has a status that was chosen for it."""

import pytest
from pydantic import ValidationError

from app import errors as service_errors
from app.api.errors import RETRY_AFTER_S, STATUS_BY_CODE, InvalidFieldsError, response_for
from app.api.schemas import ChatFields
from app.errors import QueueFullError
from dycoke_core import errors as core_errors
from dycoke_core.errors import DycokeError


def subclasses(kind: type[DycokeError]) -> set[type[DycokeError]]:
    return {kind}.union(*(subclasses(each) for each in kind.__subclasses__()))


def test_every_code_has_a_status() -> None:
    modules = (core_errors.__name__, service_errors.__name__)
    codes = {kind.code for kind in subclasses(DycokeError) if kind.__module__ in modules}
    assert codes <= set(STATUS_BY_CODE)


def test_what_may_be_retried_says_when() -> None:
    assert set(RETRY_AFTER_S) <= set(STATUS_BY_CODE)
    response = response_for(QueueFullError("the queue is full", retry_after_s=7))
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")
    assert response.media_type == "application/problem+json"


def test_error_without_a_code_of_its_own_is_internal() -> None:
    assert response_for(DycokeError("x")).status_code == 500


def test_fields_that_do_not_validate_are_named_in_our_words() -> None:
    with pytest.raises(ValidationError) as invalid:
        ChatFields.model_validate({"question": "?", "frames": 3, "end_s": 1.0, "top_p": 2.0})
    refused = InvalidFieldsError.from_pydantic(invalid.value.errors())
    assert {problem.field: problem.message for problem in refused.problems} == {
        "frames": "is not a field of this request: leave it out",
        "top_p": "Input should be less than or equal to 1",
    }
    with pytest.raises(ValidationError) as invalid:
        ChatFields.model_validate({"messages": []})
    (problem,) = InvalidFieldsError.from_pydantic(invalid.value.errors()).problems
    assert problem.field == "messages" and "at least 1 item" in problem.message
