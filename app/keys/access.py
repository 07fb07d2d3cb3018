"""Checks the settings about access: which host names are allowed, that only loopback is open
without keys unless the operator says otherwise, and which limits a key without its own has.
"""

import ipaddress
from collections.abc import Iterable

from app.keys.entries import ANONYMOUS, Principal
from app.keys.limits import NO_LIMITS, KeyLimits
from app.settings import ENV_PREFIX, Settings


def is_loopback(host: str) -> bool:
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name may come to mean another address
        return False


def is_loopback_name(host: str) -> bool:
    """Whether a Host header, without its port, names this machine to itself."""
    if host.startswith("[") and host.endswith("]") and ":" in host:
        return is_loopback(host[1:-1])
    return ":" not in host and is_loopback(host)


def is_allowed(host: str, allowed: Iterable[str]) -> bool:
    """Args:
    host: in lower case.
    allowed: names, `*.suffix` for all below one, or `*` for any.
    """
    return any(
        pattern in ("*", host) or (pattern.startswith("*.") and host.endswith(pattern[1:]))
        for pattern in allowed
    )


def check_open_door(settings: Settings, *, has_keys: bool) -> None:
    """Raises ValueError: the service would let in everybody who can reach the machine."""
    if not (has_keys or settings.allow_anonymous or is_loopback(settings.host)):
        raise ValueError(
            f"{ENV_PREFIX}HOST is {settings.host or 'empty'}, which others can reach, and there is "
            f"no API key: set {ENV_PREFIX}API_KEYS (name:key), make one with 'python -m app keys "
            f"add NAME', or set {ENV_PREFIX}ALLOW_ANONYMOUS=true to let everybody in"
        )


def limits_of(principal: Principal, settings: Settings) -> KeyLimits:
    if principal.owner == ANONYMOUS and not settings.limit_anonymous:
        return NO_LIMITS
    defaults = KeyLimits(
        max_jobs=settings.key_max_jobs,
        max_queued_jobs=settings.key_max_queued_jobs,
        tokens_per_minute=settings.key_tokens_per_minute,
        frames_per_minute=settings.key_frames_per_minute,
        max_stored_bytes=settings.key_max_stored_bytes,
        max_stored_videos=settings.key_max_stored_videos,
        max_priority=settings.key_max_priority,
    )
    return principal.limits.or_else(defaults)
