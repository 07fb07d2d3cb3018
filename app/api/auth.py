"""Checks API keys: those of `DYCOKE_API_KEYS`, and those of the file of stored keys.

The file is checked every `REFRESH_S`, so within that time a new key works and a revoked one stops
working (a network file system adds the time that it takes to show a change made elsewhere). If the
file cannot be read, or has disappeared, its last content counts for `MAX_STALE_S`. After that all
keys but the environment's are refused with a 503, because nobody knows which of them are revoked.
If there has never been a key, everybody is one principal.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from app.errors import KeysUnavailableError, UnauthorizedError
from app.keys.entries import EVERYBODY, ConfiguredKey, Principal, StoredKey, digest_of
from app.keys.file import KeyFile, KeyFileError, Signature

REFRESH_S = 1.0
MAX_STALE_S = 30.0

logger = logging.getLogger(__name__)

_NOT_VALID = "the API key is not valid: it is not known here, or was revoked"


class ApiKeys:
    """Reads the file at once, later in `run`.

    Args:
        now: a monotonic clock, in seconds.

    Raises:
        KeyFileError
    """

    def __init__(
        self,
        configured: Sequence[ConfiguredKey],
        file: KeyFile,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._configured = {key.digest: key.principal for key in configured}
        self._file = file
        self._now = now
        self._stored: dict[str, Principal] = {}
        self._known: list[Principal] = []  # stored keys, including revoked ones
        self._has_had_any = bool(configured)
        self._signature: Signature | None = None
        self._is_readable = True
        self.refresh()

    @property
    def has_any(self) -> bool:
        """Whether the service asks for keys; it still does after the last one is revoked, or is
        gone from the file."""
        return self._has_had_any

    @property
    def holders(self) -> list[Principal]:
        """The holders of all keys, including revoked ones; everybody if there are no keys."""
        return [*self._configured.values(), *self._known] or [EVERYBODY]

    def principal(self, authorization: str | None) -> Principal:
        """Returns who sends this header.

        Raises:
            UnauthorizedError: there are keys, and the header has none of them.
            KeysUnavailableError: the keys cannot be read, so it is unknown.
        """
        if not self.has_any:
            return EVERYBODY
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise UnauthorizedError(
                "no API key was sent: send one as 'Authorization: Bearer <key>'"
            )
        given = digest_of(token.strip())
        if configured := self._configured.get(given):
            return configured
        self._check_freshness()
        if stored := self._stored.get(given):
            return stored
        raise UnauthorizedError(_NOT_VALID)

    def holder(self, owner: str) -> tuple[str, Principal]:
        """Returns the digest and the holder of an owner's key.

        Raises:
            UnauthorizedError: the owner has no valid key.
            KeysUnavailableError: it is not known at the moment whether it has one.
        """
        for digest, principal in self._configured.items():
            if principal.owner == owner:
                return digest, principal
        self._check_freshness()
        for digest, principal in self._stored.items():
            if principal.owner == owner:
                return digest, principal
        raise UnauthorizedError(_NOT_VALID)

    def owner_of(self, authorization: str | None) -> str | None:
        """The owner of what this sender would create; None if `principal` refuses it."""
        try:
            return self.principal(authorization).owner
        except (UnauthorizedError, KeysUnavailableError):
            return None

    def _check_freshness(self) -> None:
        if self._now() - self._read_at > MAX_STALE_S:
            raise KeysUnavailableError(
                "the API keys cannot be checked, as the server cannot read them: try again later"
            )

    async def run(self) -> None:
        """Follows the file until it is cancelled."""
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await asyncio.to_thread(self.refresh)
            except KeyFileError as error:
                if self._is_readable:
                    logger.error("the API keys cannot be read: %s", error)
                self._is_readable = False

    def refresh(self) -> None:
        """Reads the file if it has changed. Blocks. Raises: KeyFileError."""
        began_at = self._now()
        signature = self._file.signature()
        if signature is None and self._signature is not None:
            raise KeyFileError("keys.json has disappeared from DYCOKE_DATA_DIR: put it back")
        if signature != self._signature:
            self._take(self._file.read())
            self._signature = signature
        self._is_readable = True
        self._read_at = began_at

    def _take(self, keys: Sequence[StoredKey]) -> None:
        stored = {key.digest: key.principal for key in keys if key.revoked_at_s is None}
        before = {principal.name for principal in self._stored.values()}
        names = {principal.name for principal in stored.values()}
        self._stored, self._known = stored, [key.principal for key in keys]
        self._has_had_any = self._has_had_any or bool(keys)
        logger.info(
            "API keys read",
            extra={
                "num_keys": len(stored),
                "added": sorted(names - before),
                "removed": sorted(before - names),
            },
        )
