"""What a result was measured with."""

import re
import subprocess
from importlib.metadata import version

import pytest

from loadtest import machine
from loadtest.machine import describe


def test_versions_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package-anywhere"))
    assert describe()["packages"] == {"torch": version("torch")}


def test_a_machine_is_told_by_what_matters_for_times() -> None:
    about = describe()
    assert about["machine"]["cores"] >= 1 and about["machine"]["memory_gib"] > 0
    assert about["machine"]["cpu"] and about["machine"]["load_before"] >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", about["date"])


@pytest.mark.parametrize(
    "error", [FileNotFoundError("git"), subprocess.CalledProcessError(128, "git")]
)
def test_a_commit_that_nobody_knows_is_told_as_such(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert describe()["commit"] == "unknown"
