"""The command line: what cannot run says so in one line and exits with 2."""

import pytest

from app.__main__ import main
from app.supervisor import EXIT_BAD_SETTINGS


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == EXIT_BAD_SETTINGS
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dycoke: ")
    return line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DYCOKE_PORT", "70000"),
        ("DYCOKE_LEASE_S", "soon"),
        ("DYCOKE_DTYPE", "int4"),
        ("DYCOKE_PROT", "8000"),
        ("DYCOKE_REDIS_URL", "http://localhost"),
    ],
)
def test_setting_that_cannot_be_used_is_named(
    name: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    assert name in refusal(capsys, "serve")


@pytest.mark.parametrize("command", ["api", "worker"])
def test_parts_need_a_shared_redis(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DYCOKE_REDIS_URL", raising=False)
    assert "DYCOKE_REDIS_URL" in refusal(capsys, command)
