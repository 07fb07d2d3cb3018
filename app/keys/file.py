"""The file of stored keys, in the data folder that all APIs share, and its audit log.

    {data_dir}/keys.json           {version, keys: [StoredKey]}; replaced whole, never written into
    {data_dir}/keys.lock           held while it is changed
    {data_dir}/keys.audit.jsonl    one line for each change, who made it and when; only appended to

A revoked key stays in the file, so that its name is not given to another holder by mistake, and so
that a service whose last key is revoked does not open itself to everybody. Only the owner of the
files can read them. The line in the audit log is written before the change, so there is no change
without one.
"""

import fcntl
import json
import os
import pwd
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from app.keys.entries import StoredKey, has_twice

VERSION = 1

Signature = tuple[int, int, int]


class KeyFileError(Exception):
    """The file cannot be read or written; the message says in one line why."""


class _Contents(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int
    keys: list[StoredKey]


class KeyFile:
    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "keys.json"
        self._lock_path = data_dir / "keys.lock"
        self._audit_path = data_dir / "keys.audit.jsonl"

    def signature(self) -> Signature | None:
        """Distinguishes states of the file; None where there is no file.

        Raises: KeyFileError.
        """
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise KeyFileError(f"cannot use {self._path}: {error.strerror}") from error
        return status.st_ino, status.st_mtime_ns, status.st_size

    def read(self) -> list[StoredKey]:
        """The keys, revoked ones too; none where there is no file.

        Raises: KeyFileError.
        """
        try:
            contents = _Contents.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise KeyFileError(f"cannot use {self._path}: {error.strerror}") from error
        except ValidationError as error:
            raise KeyFileError(
                f"{self._path} is not a file of keys that this release reads: put back a good copy"
            ) from error
        if contents.version != VERSION:
            raise KeyFileError(
                f"{self._path} is of version {contents.version}, and this release reads version "
                f"{VERSION}: run the release that wrote it"
            )
        if has_twice([key.digest for key in contents.keys]):
            raise KeyFileError(f"{self._path} has the same key twice: put back a good copy")
        return contents.keys

    @contextmanager
    def change(self) -> Iterator["Change"]:
        """The keys, for one change at a time; what the block made of them is written at its end.

        Raises: KeyFileError.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock_fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise KeyFileError(f"cannot use {self._lock_path}: {error.strerror}") from error
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX)  # another change takes an instant
            change = Change(self.read())
            yield change
            try:
                self._audit(change.lines)
                self._write(change.keys)
            except OSError as error:
                raise KeyFileError(f"cannot use {self._path}: {error.strerror}") from error
        finally:
            os.close(lock_fd)

    def _audit(self, lines: Sequence[dict[str, Any]]) -> None:
        author = {"at_s": time.time(), "by": _user_name()}
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(self._audit_path, flags, 0o600)
        with open(fd, "w") as file:
            file.writelines(json.dumps({**author, **line}) + "\n" for line in lines)
            file.flush()
            os.fsync(fd)

    def _write(self, keys: list[StoredKey]) -> None:
        temporary = self._path.with_name(f"keys.{uuid.uuid4().hex}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w") as file:
                file.write(_Contents(version=VERSION, keys=keys).model_dump_json(indent=1))
                file.flush()
                os.fsync(fd)
            temporary.replace(self._path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder_fd = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder_fd)  # a power cut must not bring a revoked key back
        finally:
            os.close(folder_fd)


class Change:
    """What becomes of the keys, and what the audit log will say of it."""

    def __init__(self, keys: list[StoredKey]) -> None:
        self.keys = keys
        self.lines: list[dict[str, Any]] = []

    def put(self, key: StoredKey, action: str) -> None:
        """Adds a key, or takes it in place of the last one of its holder."""
        self.keys = [other for other in self.keys if other.owner != key.owner] + [key]
        said = key.model_dump(mode="json", exclude={"digest"}, exclude_none=True)
        said["scopes"].sort()
        self.lines.append({"action": action, **said})


def _user_name() -> str:
    with suppress(KeyError):
        return pwd.getpwuid(os.getuid()).pw_name
    return str(os.getuid())
