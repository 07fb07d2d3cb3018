"""How things are timed."""

from collections.abc import Callable

from loadtest.gpu.timing import by_turns


def test_cases_are_measured_by_turns() -> None:
    order: list[str] = []

    def measure(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or float(len(order))

    cases = {"a": measure("a"), "b": measure("b")}
    assert by_turns(cases, turns=2, has_time=lambda: True) == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert order == ["a", "b", "a", "b"]
    assert by_turns(cases, turns=5, has_time=lambda: False) == {"a": [5.0], "b": [6.0]}
