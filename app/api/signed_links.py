"""Signed links to media, for browser elements that cannot send headers, such as a video player.

A link is good for one path and query, for one key, and for `LINK_LIFE_S`. It contains no secret,
only the holder's opaque id, the expiry, and a signature over all of it and over the key's digest.
So it stops working when its key is revoked or gets another secret.
"""

import hashlib
import hmac
import time
from collections.abc import Callable
from urllib.parse import parse_qs

from app.api.auth import ApiKeys
from app.errors import UnauthorizedError
from app.keys.entries import Principal
from app.store.link_secret import LinkSecret

LINK_LIFE_S = 600
SIGNATURE = "signature"

_REFUSAL = "the link is not valid, or no longer"


class SignedLinks:
    """Args:
    now: Unix time, in seconds.
    """

    def __init__(
        self, keys: ApiKeys, secret: LinkSecret, *, now: Callable[[], float] = time.time
    ) -> None:
        self._keys = keys
        self._secret = secret
        self._now = now

    async def sign(self, targets: list[str], principal: Principal) -> list[str]:
        """Returns the links, in order; if the service has no keys, the targets unchanged.

        Args:
            targets: paths, perhaps with a query.

        Raises:
            UnauthorizedError: the key has been revoked meanwhile.
            KeysUnavailableError, StoreUnavailableError
        """
        if not self._keys.has_any:
            return targets
        digest, _ = self._keys.holder(principal.owner)
        secret = await self._secret.get()
        expires_at_s = int(self._now()) + LINK_LIFE_S
        links = []
        for target in targets:
            separator = "&" if "?" in target else "?"
            signed = f"{target}{separator}expires={expires_at_s}&holder={principal.owner}"
            links.append(f"{signed}&{SIGNATURE}={_signature(secret, digest, signed)}")
        return links

    async def principal(self, target: str) -> Principal:
        """Returns the key holder of a link.

        Args:
            target: path and query, as the client sent them.

        Raises:
            UnauthorizedError: it has expired, or its holder's key is no longer valid.
            KeysUnavailableError, StoreUnavailableError
        """
        signed, _, signature = target.rpartition(f"&{SIGNATURE}=")
        fields = parse_qs(signed.partition("?")[2])
        expires, owner = fields.get("expires", [""])[-1], fields.get("holder", [""])[-1]
        if not (expires.isascii() and expires.isdigit()) or int(expires[:12]) <= self._now():
            raise UnauthorizedError(_REFUSAL)
        digest, principal = self._keys.holder(owner)
        expected = _signature(await self._secret.get(), digest, signed)
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            raise UnauthorizedError(_REFUSAL)
        return principal


def _signature(secret: bytes, digest: str, signed: str) -> str:
    return hmac.new(secret, f"{digest}\0{signed}".encode(), hashlib.sha256).hexdigest()
