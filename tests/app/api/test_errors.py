"""Every error code has a status that was chosen for it."""

from app import errors as service_errors
from app.api.errors import RETRY_AFTER_S, STATUS_BY_CODE, response_for
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
