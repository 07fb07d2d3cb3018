"""API keys. Where none are configured, everybody is one anonymous principal."""

import hashlib
import hmac
from collections.abc import Sequence

from pydantic import SecretStr

from app.errors import UnauthorizedError
from app.keys.owners import ANONYMOUS


class ApiKeys:
    """Tells who asks. Keeps digests only."""

    def __init__(self, keys: Sequence[SecretStr]) -> None:
        self._digests = [_digest(key.get_secret_value().encode()) for key in keys]

    def principal(self, authorization: str | None) -> str:
        """Returns a stable, opaque name of the key's holder.

        Raises:
            UnauthorizedError: keys are configured and `authorization` carries none of them.
        """
        if not self._digests:
            return ANONYMOUS
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise UnauthorizedError("send an API key as 'Authorization: Bearer <key>'")
        # Header values reach us decoded as latin-1.
        given = _digest(token.strip().encode("latin-1", errors="replace"))
        # Every key is compared, so that time tells nothing about which one is near.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not any(matches):
            raise UnauthorizedError("the API key is not valid")
        return given


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()
