"""`python -m app keys`: what it prints, what it keeps and what it never keeps."""

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.__main__ import main
from app.keys.entries import Scope, StoredKey, digest_of
from app.keys.file import KeyFile, KeyFileError
from app.supervisor import EXIT_BAD_SETTINGS

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYCOKE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("DYCOKE_API_KEYS", raising=False)
    return tmp_path / "data"


def make(capsys: Capture, *words: str) -> str:
    """Runs a command that prints a secret; returns it."""
    capsys.readouterr()
    assert main(["keys", *words]) == 0
    (secret,) = capsys.readouterr().out.split()
    return secret


def refusal(capsys: Capture, *words: str) -> str:
    capsys.readouterr()
    assert main(["keys", *words]) == EXIT_BAD_SETTINGS
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def only_key(data_dir: Path) -> StoredKey:
    (key,) = KeyFile(data_dir).read()
    return key


def test_secret_is_printed_once_and_kept_nowhere(data_dir: Path, capsys: Capture) -> None:
    secret = make(capsys, "add", "alice")
    assert main(["keys", "list"]) == 0
    assert main(["keys", "list", "--json"]) == 0
    assert secret not in capsys.readouterr().out
    for path in data_dir.iterdir():
        assert secret not in path.read_text()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    key = only_key(data_dir)
    assert (key.name, key.digest) == ("alice", digest_of(secret))
    assert key.scopes == {Scope.ASK, Scope.UPLOAD}


def test_scopes_limits_and_priority_are_data_on_the_key(data_dir: Path, capsys: Capture) -> None:
    words = ["--scopes", "ask,metrics", "--max-jobs", "2", "--tokens-per-minute", "500"]
    make(capsys, "add", "bob", *words, "--max-priority", "normal")
    key = only_key(data_dir)
    assert key.scopes == {Scope.ASK, Scope.METRICS}
    assert (key.limits.max_jobs, key.limits.tokens_per_minute) == (2, 500)
    assert (key.limits.max_queued_jobs, key.limits.frames_per_minute) == (None, None)
    assert key.principal.limits.max_priority == "normal"
    assert main(["keys", "limit", "bob", "--max-priority", "low"]) == 0
    assert only_key(data_dir).limits.max_priority == "low"


@pytest.mark.parametrize(
    ("option", "value", "right"),
    [
        ("--scopes", "all", "some of ask, upload"),
        ("--scopes", ",", "at least one of ask, upload"),
        ("--max-priority", "3", "normal"),
        ("--max-queued-jobs", "-1", "a whole number from 0 to"),
        ("--max-jobs", "many", "a whole number from 0 to"),
        ("--weight", "heavy", "a number from"),
        ("--weight", "nan", "a number from"),
    ],
)
def test_what_cannot_be_of_a_key_is_refused_with_what_can(
    option: str, value: str, right: str, data_dir: Path, capsys: Capture
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["keys", "add", "eve", option, value])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert option in said and right in said
    assert KeyFile(data_dir).read() == []


def test_limits_change_one_by_one_and_are_in_the_audit_log(data_dir: Path, capsys: Capture) -> None:
    make(capsys, "add", "alice", "--max-jobs", "2", "--frames-per-minute", "60")
    assert main(["keys", "limit", "alice", "--max-jobs", "0", "--tokens-per-minute", "9"]) == 0
    limits = {"max_jobs": 0, "tokens_per_minute": 9, "frames_per_minute": 60}
    assert only_key(data_dir).limits.model_dump(exclude_none=True) == limits
    last = json.loads((data_dir / "keys.audit.jsonl").read_text().splitlines()[-1])
    assert (last["action"], last["limits"]) == ("limit", limits)
    assert "no key 'bob'" in refusal(capsys, "limit", "bob", "--max-jobs", "1")


def test_rotated_key_has_another_secret_and_the_same_holder(
    data_dir: Path, capsys: Capture
) -> None:
    first = make(capsys, "add", "alice")
    owner = only_key(data_dir).owner
    second = make(capsys, "rotate", "alice")
    assert first != second
    assert (only_key(data_dir).owner, only_key(data_dir).digest) == (owner, digest_of(second))


def test_revoked_key_is_no_longer_there_but_known(data_dir: Path, capsys: Capture) -> None:
    make(capsys, "add", "alice")
    assert main(["keys", "revoke", "alice"]) == 0
    revoked = only_key(data_dir)
    assert revoked.revoked_at_s is not None
    for action in ("revoke", "rotate"):
        assert "no key 'alice'" in refusal(capsys, action, "alice")
    make(capsys, "add", "alice")
    owners = {key.owner for key in KeyFile(data_dir).read()}
    assert len(owners) == 2, "another holder, who sees nothing of the first one's"


def test_names_are_given_once(
    data_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(capsys, "add", "alice")
    assert "rotate" in refusal(capsys, "add", "alice")
    assert "A-Z" in refusal(capsys, "add", "a b")
    monkeypatch.setenv("DYCOKE_API_KEYS", "carol:" + "x" * 32)
    assert "DYCOKE_API_KEYS" in refusal(capsys, "add", "carol")
    assert len(KeyFile(data_dir).read()) == 1


def test_audit_log_tells_every_change_and_no_secret(data_dir: Path, capsys: Capture) -> None:
    secret = make(capsys, "add", "alice", "--scopes", "ask")
    make(capsys, "rotate", "alice")
    assert main(["keys", "revoke", "alice"]) == 0
    text = (data_dir / "keys.audit.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["action"] for line in lines] == ["add", "rotate", "revoke"]
    assert all(line["name"] == "alice" and line["by"] and line["at_s"] for line in lines)
    assert lines[0]["scopes"] == ["ask"]
    assert secret not in text and digest_of(secret) not in text


def test_changes_at_the_same_time_are_all_kept(data_dir: Path) -> None:
    def add(number: int) -> None:
        with KeyFile(data_dir).change() as change:
            change.put(
                StoredKey(
                    owner=f"o{number}", name=f"n{number}", digest=f"d{number}", created_at_s=1
                ),
                "add",
            )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    assert len(KeyFile(data_dir).read()) == 40
    assert len((data_dir / "keys.audit.jsonl").read_text().splitlines()) == 40


def test_change_that_cannot_be_written_leaves_the_file_whole(
    data_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(capsys, "add", "alice")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in refusal(capsys, "add", "bob")
    monkeypatch.undo()
    assert [key.name for key in KeyFile(data_dir).read()] == ["alice"]
    assert not [path for path in data_dir.iterdir() if len(path.name) > 30], "no remains"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 2, "keys": []}', '{"version": 1, "keys": [{"name": 1}]}']
)
def test_file_that_is_none_of_keys_is_refused(data_dir: Path, text: str, capsys: Capture) -> None:
    data_dir.mkdir()
    (data_dir / "keys.json").write_text(text)
    with pytest.raises(KeyFileError):
        KeyFile(data_dir).read()
    assert "keys.json" in refusal(capsys, "add", "alice")
    assert (data_dir / "keys.json").read_text() == text
