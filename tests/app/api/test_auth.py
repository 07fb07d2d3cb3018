"""Who is let in: holders of configured keys and of stored ones as they change, and no one else."""

import logging
from pathlib import Path

import pytest

from app.api.auth import MAX_STALE_S, ApiKeys
from app.errors import ForbiddenError, KeysUnavailableError, UnauthorizedError
from app.keys.entries import (
    ANONYMOUS,
    EVERYBODY,
    Scope,
    StoredKey,
    digest_of,
    parse_configured_keys,
)
from app.keys.file import KeyFile, KeyFileError

ONE, TWO = "one-" + "1" * 32, "two-" + "2" * 32
STORED = "stored-" + "3" * 32
CONFIGURED = parse_configured_keys(f"one:{ONE}, two:{TWO}")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def put(folder: Path, secret: str = STORED, name: str = "stored", **fields: object) -> None:
    key = {"owner": f"key_{name}", "name": name, "digest": digest_of(secret), "created_at_s": 1.0}
    with KeyFile(folder).change() as change:
        change.put(StoredKey.model_validate({**key, **fields}), "test")


def test_without_keys_everybody_is_one_and_may_do_everything(tmp_path: Path) -> None:
    keys = ApiKeys([], KeyFile(tmp_path))
    assert keys.principal(None) is keys.principal("Bearer x") is EVERYBODY
    assert EVERYBODY.owner == ANONYMOUS and EVERYBODY.scopes == set(Scope)


def test_key_holders_are_told_apart_without_naming_the_key(tmp_path: Path) -> None:
    keys = ApiKeys(CONFIGURED, KeyFile(tmp_path))
    one = keys.principal(f"Bearer {ONE}")
    assert one == keys.principal(f"bearer  {ONE} ")
    two = keys.principal(f"Bearer {TWO}")
    assert one.owner != two.owner
    assert ONE not in str(one) and digest_of(ONE) not in str(one)


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", ONE, f"Basic {ONE}", f"Bearer {ONE[:-1]}", f"Bearer one:{ONE}"],
)
def test_others_are_refused(header: str | None, tmp_path: Path) -> None:
    with pytest.raises(UnauthorizedError):
        ApiKeys(CONFIGURED, KeyFile(tmp_path)).principal(header)


def test_stored_keys_come_change_and_go_without_a_restart(tmp_path: Path) -> None:
    keys = ApiKeys([], KeyFile(tmp_path))
    assert not keys.has_any
    put(tmp_path)
    keys.refresh()
    principal = keys.principal(f"Bearer {STORED}")
    assert (principal.owner, principal.name) == ("key_stored", "stored")
    with pytest.raises(UnauthorizedError):
        keys.principal(None)
    principal.require(Scope.UPLOAD)
    put(tmp_path, scopes=["ask"])
    keys.refresh()
    with pytest.raises(ForbiddenError, match="upload"):
        keys.principal(f"Bearer {STORED}").require(Scope.UPLOAD)
    put(tmp_path, revoked_at_s=2.0)
    keys.refresh()
    with pytest.raises(UnauthorizedError):
        keys.principal(f"Bearer {STORED}")
    with pytest.raises(UnauthorizedError):
        keys.principal(None)
    assert keys.has_any, "revoking the last key does not open the service"


def test_keys_that_cannot_be_read_stand_for_a_while_and_then_for_nothing(tmp_path: Path) -> None:
    clock = Clock()
    put(tmp_path)
    keys = ApiKeys(CONFIGURED, KeyFile(tmp_path), now=clock)
    path = tmp_path / "keys.json"
    text = path.read_text()
    for vandalise in (path.unlink, lambda: path.write_text("{")):
        vandalise()
        clock.now_s += MAX_STALE_S - 1
        with pytest.raises(KeyFileError):
            keys.refresh()
        assert keys.principal(f"Bearer {STORED}").name == "stored"
        clock.now_s += 2
        for secret in (STORED, "unknown-" + "4" * 32):
            with pytest.raises(KeysUnavailableError):
                keys.principal(f"Bearer {secret}")
        assert keys.principal(f"Bearer {ONE}").name == "one", "the environment's keys stay valid"
        path.write_text(text)
        keys.refresh()
        assert keys.principal(f"Bearer {STORED}").name == "stored"


def test_a_file_that_loses_all_its_keys_does_not_open_the_service(tmp_path: Path) -> None:
    put(tmp_path)
    keys = ApiKeys([], KeyFile(tmp_path))
    (tmp_path / "keys.json").write_text('{"version": 1, "keys": []}')
    keys.refresh()
    assert keys.has_any
    for header in (None, f"Bearer {STORED}"):
        with pytest.raises(UnauthorizedError):
            keys.principal(header)


def test_log_names_keys_and_shows_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    put(tmp_path)
    keys = ApiKeys(CONFIGURED, KeyFile(tmp_path))
    keys.principal(f"Bearer {STORED}")
    (record,) = caplog.records
    assert getattr(record, "added", None) == ["stored"]
    said = str([r.__dict__ for r in caplog.records])
    assert not any(word in said for s in (ONE, STORED) for word in (s, digest_of(s)))
