"""Names of hosts, as operators allow them and as clients write them."""

from collections.abc import Iterable

from app.keys.access import is_loopback


def is_allowed(host: str, allowed: Iterable[str]) -> bool:
    """Args:
    host: in lower case.
    allowed: names, `*.suffix` for all below one, or `*` for any.
    """
    return any(
        pattern in ("*", host) or (pattern.startswith("*.") and host.endswith(pattern[1:]))
        for pattern in allowed
    )


def is_loopback_name(host: str) -> bool:
    """Whether a Host header, without its port, names this machine to itself."""
    if host.startswith("[") and host.endswith("]") and ":" in host:
        return is_loopback(host[1:-1])
    return ":" not in host and is_loopback(host)
