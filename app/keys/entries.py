"""Keys: their parts, how a secret becomes a digest, and who the holder is to the service.

A secret has at least `MIN_KEY_CHARS` characters of printable ASCII, and only its client knows it:
the service keeps SHA-256 digests and looks a key up by its digest, so response times reveal nothing
about a secret. A plain digest is enough because secrets are random. Those of `DYCOKE_API_KEYS` are
hashed when they are read, and never written anywhere.
"""

import hashlib
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from app.errors import ForbiddenError
from app.keys.limits import NO_LIMITS, KeyLimits

ANONYMOUS = "anonymous"  # the owner of everything, where there are no keys
OWNER_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
MIN_KEY_CHARS = 32
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FORM = "write each key as name:key, comma-separated; clients send the part after the first colon"

_SECRET = re.compile(r"[\x21-\x7e]+")


class Scope(StrEnum):
    ASK = "ask"  # questions, and the jobs that they become
    UPLOAD = "upload"  # videos, ahead of their questions or with them
    METRICS = "metrics"  # /metrics, where it is not public
    ADMIN = "admin"  # the usage of every key


DEFAULT_SCOPES = frozenset({Scope.ASK, Scope.UPLOAD})


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks.

    Args:
        owner: of its jobs and videos; reveals nothing about the key.
        name: of the key, for people.
    """

    owner: str
    name: str
    scopes: frozenset[Scope] = DEFAULT_SCOPES
    limits: KeyLimits = NO_LIMITS

    def require(self, scope: Scope) -> None:
        """Raises: ForbiddenError."""
        if scope not in self.scopes:
            raise ForbiddenError(f"this API key lacks the scope '{scope}': use one that has it")


EVERYBODY = Principal(ANONYMOUS, ANONYMOUS, frozenset(Scope))  # where there are no keys


@dataclass(frozen=True, slots=True)
class ConfiguredKey:
    """A key out of `DYCOKE_API_KEYS`. Its holder stays the same when its secret is exchanged."""

    name: str
    digest: str

    @property
    def principal(self) -> Principal:
        owner = hashlib.sha256(f"configured\0{self.name}".encode()).hexdigest()[:32]
        return Principal(f"key_{owner}", self.name)


class StoredKey(BaseModel):
    """A key of the kind that `python -m app keys` makes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    owner: str
    name: str
    digest: str
    scopes: frozenset[Scope] = DEFAULT_SCOPES
    limits: KeyLimits = NO_LIMITS
    max_priority: int = Field(0, exclude=True)  # kept by earlier releases, and never used
    created_at_s: float  # Unix time
    revoked_at_s: float | None = None

    @property
    def principal(self) -> Principal:
        return Principal(self.owner, self.name, self.scopes, self.limits)


def new_secret() -> str:
    return f"dyk_{secrets.token_urlsafe(32)}"


def new_owner() -> str:
    return f"key_{secrets.token_hex(16)}"


def digest_of(secret: str) -> str:
    """Keys are ASCII: what is not is the digest of none, however its bytes are read."""
    return hashlib.sha256(secret.encode()).hexdigest()


def parse_configured_keys(text: str) -> tuple[ConfiguredKey, ...]:
    """Reads `DYCOKE_API_KEYS`.

    Raises:
        ValueError: which entry is wrong, and the form; never a part of a key.
    """
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries:
        raise ValueError(f"it is set but names no key: {FORM}")
    keys = tuple(_parse(number, entry) for number, entry in enumerate(entries, 1))
    if has_twice([key.name for key in keys]):
        raise ValueError("two keys have the same name: give each its own")
    if has_twice([key.digest for key in keys]):
        raise ValueError("two names have the same key: give each its own")
    return keys


def has_twice(values: Collection[str]) -> bool:
    return len(set(values)) < len(values)


def _parse(number: int, entry: str) -> ConfiguredKey:
    name, colon, secret = entry.partition(":")
    if not colon:
        raise ValueError(f"key {number} has no name: {FORM}")
    if not NAME.fullmatch(name):
        raise ValueError(f"the name of key {number} is not made of A-Z, a-z, 0-9, '.', '_' and '-'")
    if len(secret) < MIN_KEY_CHARS or not _SECRET.fullmatch(secret):
        raise ValueError(
            f"key {number}, after its name, must have at least {MIN_KEY_CHARS} printable ASCII "
            "characters without a space"
        )
    return ConfiguredKey(name, digest_of(secret))


def cache_salt(owner: str, *, are_caches_shared: bool) -> str:
    """Keeps an owner's frames and features from the others, to whom a cache hit would reveal that
    someone has asked about the same video."""
    return "" if owner == ANONYMOUS or are_caches_shared else owner
