"""The command line: what cannot run says so in one line and exits with 2."""

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.__main__ import main
from app.keys.access import check_open_door
from app.settings import Settings
from app.supervisor import EXIT_BAD_SETTINGS


@pytest.fixture(autouse=True)
def logging_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`main` makes the process log to the test's standard error, which is closed after the test."""
    for name in ("_srcfile", "logThreads", "logProcesses", "logMultiprocessing"):
        monkeypatch.setattr(logging, name, getattr(logging, name))
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(False)


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
        ("DYCOKE_API_KEYS", ""),
        ("DYCOKE_API_KEYS", " , "),
        ("DYCOKE_API_KEYS", "a"),
        ("DYCOKE_API_KEYS", "a-secret-that-must-not-be-shown-anywhere"),
        ("DYCOKE_ALLOWED_HOSTS", ""),
        ("DYCOKE_ALLOWED_HOSTS", "https://api.example.com"),
        ("DYCOKE_ALLOWED_ORIGINS", "*"),
        ("DYCOKE_ALLOWED_ORIGINS", "app.example.com"),
    ],
)
def test_setting_that_cannot_be_used_is_named(
    name: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    line = refusal(capsys, "serve")
    assert name in line and "must-not-be-shown" not in line


def test_a_setting_spelt_wrong_is_answered_with_the_right_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYCOKE_MAX_FRAME", "8")
    monkeypatch.setenv("DYCOKE_QZX", "1")
    line = refusal(capsys, "serve")
    assert "DYCOKE_MAX_FRAME (did you mean DYCOKE_MAX_FRAMES?)" in line
    assert line.endswith("; DYCOKE_QZX")


def test_settings_that_do_not_fit_each_other_are_both_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYCOKE_MAX_INCOMING_BYTES", "1000")
    monkeypatch.setenv("DYCOKE_MAX_UPLOAD_BYTES", "2000")
    expected = (
        "dycoke: DYCOKE_MAX_INCOMING_BYTES must be at least DYCOKE_MAX_UPLOAD_BYTES, which is 2000"
    )
    assert refusal(capsys, "serve") == expected


@pytest.mark.parametrize("command", ["api", "worker"])
def test_parts_need_a_shared_redis(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DYCOKE_REDIS_URL", raising=False)
    assert "DYCOKE_REDIS_URL" in refusal(capsys, command)


@pytest.mark.parametrize("command", ["serve", "api"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "service.example", ""])
def test_address_that_others_can_reach_is_not_served_without_keys(
    command: str,
    host: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DYCOKE_HOST", host)
    monkeypatch.setenv("DYCOKE_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("DYCOKE_REDIS_URL", "redis://localhost")
    line = refusal(capsys, command)
    for name in ("DYCOKE_HOST", "DYCOKE_API_KEYS", "keys add", "DYCOKE_ALLOW_ANONYMOUS"):
        assert name in line


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_loopback_address_is_served_without_keys(host: str) -> None:
    check_open_door(Settings(host=host), has_keys=False)


def test_other_addresses_are_served_with_keys_or_where_the_operator_lets_everybody_in() -> None:
    check_open_door(Settings(host="0.0.0.0"), has_keys=True)
    check_open_door(Settings(host="0.0.0.0", allow_anonymous=True), has_keys=False)


@pytest.mark.parametrize("command", ["serve", "worker"])
@pytest.mark.parametrize("part", ["directory", "config.json"])
def test_a_model_that_cannot_be_read_is_named(
    command: str,
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Tests may run as root, who can read everything, so the system's answer is simulated."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")

    def deny(path: Path) -> None:
        if path == (model if part == "directory" else model / "config.json"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    is_dir, read_text = Path.is_dir, Path.read_text
    monkeypatch.setattr(Path, "is_dir", lambda path: (deny(path), is_dir(path))[1])
    monkeypatch.setattr(
        Path, "read_text", lambda path, *args, **kw: (deny(path), read_text(path, *args, **kw))[1]
    )
    monkeypatch.setenv("DYCOKE_MODEL", str(model))
    monkeypatch.setenv("DYCOKE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("DYCOKE_REDIS_URL", "redis://127.0.0.1:1")
    line = refusal(capsys, command)
    assert line.startswith("dycoke: DYCOKE_MODEL: ") and "cannot be read: Permission denied" in line
    assert part in line
    assert not (tmp_path / "data").exists(), "nothing was started"


def test_a_models_name_that_no_file_may_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYCOKE_MODEL", "m" * 300)
    assert "DYCOKE_MODEL: the model directory cannot be read" in refusal(capsys, "serve")
