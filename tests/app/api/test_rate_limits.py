"""Limits in headers, as the draft writes them."""

from app.api.rate_limits import rate_limit_headers
from app.keys.limits import LimitState


def test_without_limits_nothing_is_said() -> None:
    assert rate_limit_headers(()) == {}


def test_every_limit_has_its_policy_and_what_is_left_of_it() -> None:
    jobs = LimitState("jobs", "concurrent-requests", limit=4, left=0)
    tokens = LimitState("tokens", "tokens", limit=1000, left=250, window_s=60, more_in_s=3)
    assert rate_limit_headers([jobs, tokens]) == {
        "RateLimit-Policy": '"jobs";q=4;qu="concurrent-requests", "tokens";q=1000;qu="tokens";w=60',
        "RateLimit": '"jobs";r=0, "tokens";r=250;t=3',
    }
