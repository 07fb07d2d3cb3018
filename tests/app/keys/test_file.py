"""The file of keys: replaced whole, changed by one process at a time, never mistaken for empty."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from app.keys.entries import Scope, StoredKey, digest_of
from app.keys.file import KeyFile, KeyFileError
from app.keys.limits import KeyLimits


def key(name: str, secret: str = "", **fields: object) -> StoredKey:
    said = {"owner": f"key_{name}", "name": name, "digest": digest_of(secret or name)}
    return StoredKey(**{**said, "created_at_s": 1.0, **fields})


def put(file: KeyFile, *keys: StoredKey, action: str = "add") -> None:
    with file.change() as change:
        for one in keys:
            change.put(one, action)


def audit(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "keys.audit.jsonl").read_text().splitlines()]


def test_what_was_put_is_read(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "new")
    assert file.read() == [] and file.signature() is None
    keys = [key("alice"), key("bob", scopes={Scope.ADMIN}, limits=KeyLimits(max_jobs=3))]
    put(file, *keys)
    assert file.read() == keys


def test_a_holders_key_takes_the_place_of_its_last_one(tmp_path: Path) -> None:
    file = KeyFile(tmp_path)
    put(file, key("alice"), key("bob"))
    rotated = key("alice", "another")
    put(file, rotated, action="rotate")
    assert file.read() == [key("bob"), rotated]
    assert [line["action"] for line in audit(tmp_path)] == ["add", "add", "rotate"]


def test_the_audit_log_says_who_and_when_and_nothing_of_a_secret(tmp_path: Path) -> None:
    put(KeyFile(tmp_path), key("alice", scopes={Scope.UPLOAD, Scope.ASK}))
    (line,) = audit(tmp_path)
    assert line["name"] == "alice" and line["by"] and isinstance(line["at_s"], float)
    assert line["scopes"] == ["ask", "upload"] and "digest" not in line


def test_each_state_has_a_signature_of_its_own(tmp_path: Path) -> None:
    file = KeyFile(tmp_path)
    signatures = []
    for number in range(3):
        put(file, key("alice", str(number)))
        signatures.append(file.signature())
    assert len(set(signatures)) == 3 and None not in signatures
    assert file.signature() == signatures[-1]


def test_the_files_are_their_owners_alone(tmp_path: Path) -> None:
    put(KeyFile(tmp_path), key("alice"))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("keys.json", "keys.lock", "keys.audit.jsonl"), 0o600)


def test_a_change_that_fails_leaves_everything_as_it_was(tmp_path: Path) -> None:
    file = KeyFile(tmp_path)
    put(file, key("alice"))
    with pytest.raises(RuntimeError), file.change() as change:
        change.put(key("bob"), "add")
        raise RuntimeError
    assert [one.name for one in file.read()] == ["alice"] and len(audit(tmp_path)) == 1
    put(file, key("bob"))  # the lock is free


def test_a_disk_that_fails_is_told_and_leaves_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = KeyFile(tmp_path)
    put(file, key("alice"))

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patches:
        patches.setattr(Path, "replace", fail)
        with pytest.raises(KeyFileError, match="No space left"):
            put(file, key("bob"))
    assert [one.name for one in file.read()] == ["alice"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "keys.json",
        "keys.lock",
        "keys.audit.jsonl",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a file of keys"),
        ("[]", "not a file of keys"),
        ('{"version": 1, "keys": [{"name": "a"}]}', "not a file of keys"),
        ('{"version": 1, "keys": [], "more": 1}', "not a file of keys"),
        ('{"version": 2, "keys": []}', "of version 2"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_no_empty_one(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "keys.json").write_text(content)
    with pytest.raises(KeyFileError, match=message):
        KeyFile(tmp_path).read()


def test_the_same_key_twice_is_refused(tmp_path: Path) -> None:
    keys = [key(name, "same").model_dump(mode="json") for name in ("alice", "bob")]
    (tmp_path / "keys.json").write_text(json.dumps({"version": 1, "keys": keys}))
    with pytest.raises(KeyFileError, match="twice"):
        KeyFile(tmp_path).read()


def test_a_folder_in_its_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "keys.json").mkdir()
    with pytest.raises(KeyFileError, match="directory"):
        KeyFile(tmp_path).read()
    (tmp_path / "file").touch()
    for call in (KeyFile(tmp_path / "file").signature, KeyFile(tmp_path / "file").read):
        with pytest.raises(KeyFileError):
            call()
    with pytest.raises(KeyFileError), KeyFile(tmp_path / "file").change():
        pass


def test_changes_come_one_after_another(tmp_path: Path) -> None:
    def add(name: str) -> None:
        put(KeyFile(tmp_path), key(name))

    threads = [threading.Thread(target=add, args=(f"n{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(KeyFile(tmp_path).read()) == len(audit(tmp_path)) == 8
    assert not list(os.scandir(tmp_path))[3:]
