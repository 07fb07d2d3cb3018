"""Names and addresses of this machine alone, names that a pattern allows, and a key's limits."""

import pytest

from app.keys.access import (
    check_open_door,
    is_allowed,
    is_loopback,
    is_loopback_name,
    limits_of,
)
from app.keys.entries import ANONYMOUS, DEFAULT_SCOPES, Principal
from app.keys.limits import NO_LIMITS, KeyLimits
from app.settings import Settings

SETTINGS = Settings(key_max_jobs=4, key_tokens_per_minute=1000)


def principal(owner: str, **limits: int) -> Principal:
    return Principal(owner=owner, name="n", scopes=DEFAULT_SCOPES, limits=KeyLimits(**limits))


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "127.0.0.1", "127.1.2.3", "::1"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    check_open_door(Settings(host=host), has_keys=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "api", "", "localhost.evil.net"])
def test_other_addresses_need_one(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ValueError, match="DYCOKE_ALLOW_ANONYMOUS"):
        check_open_door(Settings(host=host), has_keys=False)
    check_open_door(Settings(host=host), has_keys=True)
    check_open_door(Settings(host=host, allow_anonymous=True), has_keys=False)


def test_a_keys_own_limits_go_before_the_settings() -> None:
    limits = limits_of(principal("owner", max_jobs=9), SETTINGS)
    assert (limits.max_jobs, limits.tokens_per_minute) == (9, 1000)


def test_who_has_no_key_is_limited_where_the_operator_says_so() -> None:
    assert limits_of(principal(ANONYMOUS), SETTINGS) == NO_LIMITS
    limited = SETTINGS.model_copy(update={"limit_anonymous": True})
    assert limits_of(principal(ANONYMOUS), limited).max_jobs == 4


@pytest.mark.parametrize(
    ("host", "is_expected"),
    [
        ("video.example.org", True),
        ("a.example.com", True),
        ("a.b.example.com", True),
        ("example.com", False),  # below it, not itself
        ("badexample.com", False),
        ("video.example.org.evil.net", False),
        ("", False),
    ],
)
def test_names_are_allowed_whole_or_below_a_suffix(host: str, is_expected: bool) -> None:
    assert is_allowed(host, ["video.example.org", "*.example.com"]) is is_expected
    assert is_allowed(host, ["*"])
    assert not is_allowed(host, [])


@pytest.mark.parametrize(
    ("host", "is_expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("[::1]", True),
        ("::1", False),  # no header writes it so
        ("[127.0.0.1]", False),
        ("localhost.evil.net", False),
        ("10.0.0.1", False),
        ("example.com", False),
    ],
)
def test_loopback_by_name_or_address(host: str, is_expected: bool) -> None:
    assert is_loopback_name(host) is is_expected
