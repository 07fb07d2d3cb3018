"""A failure is reported whatever its test's garbage does when it is collected."""

import ast
import gc
from collections.abc import Iterator
from contextlib import suppress

import pytest


class Garbage:
    """Parses when it is collected, and leaves more of its kind."""

    is_wanted = True
    num_collected = 0

    def __init__(self) -> None:
        self.cycle = self

    def __del__(self) -> None:
        Garbage.num_collected += 1
        if Garbage.is_wanted:
            Garbage()
        with suppress(SystemError):  # it comes in the middle of another
            ast.parse("f(g(h(1)))")


@pytest.fixture
def garbage() -> Iterator[type[Garbage]]:
    """Some of it is collected at nearly every allocation."""
    thresholds = gc.get_threshold()
    gc.set_threshold(50, 1, 1)
    for _ in range(20):  # one alone may be taken for something that lives long
        Garbage()
    yield Garbage
    gc.set_threshold(*thresholds)
    Garbage.is_wanted = False
    gc.collect()


def fail() -> None:
    raise AssertionError("as it should")


def test_a_report_is_made_before_garbage_is_collected(
    garbage: type[Garbage], request: pytest.FixtureRequest
) -> None:
    call = pytest.CallInfo.from_call(fail, "call")
    while garbage.num_collected == 0:
        garbage()
    report = request.node.ihook.pytest_runtest_makereport(item=request.node, call=call)
    assert report.failed and "as it should" in report.longreprtext
    gc.collect()
    assert gc.isenabled()
