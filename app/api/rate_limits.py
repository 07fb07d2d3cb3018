"""The `RateLimit` headers: what a key has left of its limits.

They follow draft-ietf-httpapi-ratelimit-headers-11, "RateLimit header fields for HTTP" (structured
fields, RFC 9651). `RateLimit-Policy` lists the limits, with `q` the quota, `qu` its unit and `w`
the window in seconds. `RateLimit` says what is left (`r`), and in how many seconds there will be
more (`t`). If `Retry-After` is sent, too, it takes precedence.

Deviation: the units `tokens` and `frames` are not in the draft's registry, which has none for them.
"""

from collections.abc import Sequence

from app.keys.limits import LimitState


def rate_limit_headers(limit_states: Sequence[LimitState]) -> dict[str, str]:
    """None where there are no limits."""
    if not limit_states:
        return {}
    return {
        "RateLimit-Policy": ", ".join(map(_policy, limit_states)),
        "RateLimit": ", ".join(map(_left, limit_states)),
    }


def _policy(state: LimitState) -> str:
    window = "" if state.window_s is None else f";w={state.window_s}"
    return f'"{state.name}";q={state.limit};qu="{state.unit}"{window}'


def _left(state: LimitState) -> str:
    more_in = "" if state.more_in_s is None else f";t={state.more_in_s}"
    return f'"{state.name}";r={state.left}{more_in}'
