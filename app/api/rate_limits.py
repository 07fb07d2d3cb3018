"""How a key stands to its limits, in headers.

As of draft-ietf-httpapi-ratelimit-headers-11, "RateLimit header fields for HTTP" (structured
fields, RFC 9651): `RateLimit-Policy` lists the limits, with `q` the quota, `qu` its unit and `w`
the window in seconds; `RateLimit` what is left (`r`), and in how many seconds there will be more
(`t`). Where both are sent, `Retry-After` is what counts.

Deviation: the units `tokens` and `frames` are not in the draft's registry, which has none for them.
"""

from collections.abc import Sequence

from app.keys.limits import Quota


def rate_limit_headers(quotas: Sequence[Quota]) -> dict[str, str]:
    """None where there are no limits."""
    if not quotas:
        return {}
    return {
        "RateLimit-Policy": ", ".join(map(_policy, quotas)),
        "RateLimit": ", ".join(map(_left, quotas)),
    }


def _policy(quota: Quota) -> str:
    window = "" if quota.window_s is None else f";w={quota.window_s}"
    return f'"{quota.name}";q={quota.limit};qu="{quota.unit}"{window}'


def _left(quota: Quota) -> str:
    more_in = "" if quota.more_in_s is None else f";t={quota.more_in_s}"
    return f'"{quota.name}";r={quota.left}{more_in}'
